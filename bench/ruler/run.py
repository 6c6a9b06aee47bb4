"""All samples of some variants, one after another, skipping what the store has."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from apb.engine.engine import Engine
from apb.engine.setup import Setup
from bench.ruler.answers import FullAnswers
from bench.ruler.base import RulerSample
from bench.ruler.measure import measure
from bench.ruler.prompts import prompt
from bench.ruler.summary import CHOOSE
from bench.ruler.variant import FULL, Variant
from bench.tools.conditions import commit
from bench.tools.rows import RowStore

OnSample = Callable[[int, int], None]  # samples done, samples to do


@dataclasses.dataclass(frozen=True)
class RulerSamples:
    """Some samples of one length and seed set."""

    items: Sequence[RulerSample]
    tokens: int
    seeds: str


def run(
    variants: Iterable[Variant],
    samples: RulerSamples,
    rows: RowStore,
    full: FullAnswers,
    cluster: str,
    *,
    decode: bool,
    on_sample: OnSample,
) -> None:
    """Measure every sample under every variant. Raises what engines raise.

    A row that was measured without decoding is measured again when decoding is asked for. Samples for choosing are
    measured by log-probability alone, without the distance from full attention.
    """
    todo = [
        (variant, sample, _key(variant, sample, decode))
        for variant in variants
        for sample in samples.items
        if variant.takes(sample)
    ]
    todo = [each for each in todo if each[2] not in rows]
    with _engines(cluster) as engine_of:
        on_sample(0, len(todo))
        for done, (variant, sample, key) in enumerate(todo, 1):
            start = time.perf_counter()
            asked = variant.prompt(sample)
            engine = engine_of(variant.fitted(asked.lengths))
            reference = None
            if variant.label != FULL and samples.seeds != CHOOSE:
                reference = _reference(sample, full, engine_of, variant)
            row, first_FV = measure(engine, sample, asked, reference, decode=decode)
            if variant.label == FULL:
                row["kl"] = 0.0
                full.put(_full_key(variant, sample), first_FV)
            seconds = round(time.perf_counter() - start, 2)
            rows.add(key, _about(variant, sample, samples) | row | {"seconds": seconds, "commit": commit()})
            on_sample(done, len(todo))


def _reference(
    sample: RulerSample, full: FullAnswers, engine_of: Callable[[Setup], Engine], variant: Variant
) -> Tensor:
    """Full attention's distributions for a sample: kept ones, or measured now."""
    key, setup = _full_key(variant, sample), variant.setup
    found = full.get(key)
    if found is None:
        engine = engine_of(setup.using("full", hosts=1))
        _, found = measure(engine, sample, prompt(setup.tokenizer, sample), None, decode=False)
        full.put(key, found)
    return found


@contextlib.contextmanager
def _engines(cluster: str) -> Iterator[Callable[[Setup], Engine]]:
    """Give engines for setups of the same model: one cluster a number of hosts, started when first needed."""
    started: dict[int, Engine] = {}

    def engine_of(setup: Setup) -> Engine:
        if setup.hosts not in started:
            started[setup.hosts] = Engine.launch(setup, cluster=cluster)
        engine = started[setup.hosts]
        engine.setup = setup
        return engine

    try:
        yield engine_of
    finally:
        for engine in started.values():
            engine.close()


def _about(variant: Variant, sample: RulerSample, samples: RulerSamples) -> dict[str, object]:
    setup = variant.setup
    return {
        "model": variant.model,
        "dtype": setup.spec.dtype,
        "variant": variant.label,
        "base": variant.base,
        "strategy": setup.strategy.name,
        "compressor": variant.compressor,
        "random": variant.random,
        "hosts": setup.hosts,
        "question_first": variant.question_first,
        "task": sample.task,
        "tokens": samples.tokens,
        "seeds": samples.seeds,
        "index": sample.seed,
    }


def _key(variant: Variant, sample: RulerSample, decode: bool) -> str:
    how = "decoded" if decode and sample.chat else "scored"
    return f"{variant.model} {variant.setup.spec.dtype}/{variant.label}/{how}/{sample.seed}"


def _full_key(variant: Variant, sample: RulerSample) -> str:
    return f"{variant.model} {variant.setup.spec.dtype}/{sample.seed}"
