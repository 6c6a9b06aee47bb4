"""The test material itself: every family builds and runs, and what makes it special shows in its logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.families import FAMILIES, VOCAB, WINDOW, build_family, whole_greedy, whole_logits
from tests.support.tiny import random_ids

IDS = random_ids(130, 1, vocab=VOCAB)
SHOWS = 0.1  # of logits of size 1 to 10; comparisons are to 1e-4
# Parameters put to values that switch a mechanism off: sinks take nothing, states are forgotten at once.
OFF = {"sinks": -30.0, "attention_sink_bias": -30.0, "A_log": 4.0}


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b)[-1].abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_and_its_parts_matter(name: str) -> None:
    family = FAMILIES[name]
    logits = whole_logits(build_family(name), IDS)
    assert logits.isfinite().all() and 0.1 < float(logits.std()) < 5
    assert len(set(logits.argmax(-1).tolist())) > len(IDS) // 5  # not one token for ever
    exact = whole_logits(build_family(name, torch.float64), IDS)
    assert difference(exact, logits) < 1e-4  # or roundings alone would fail every comparison
    for changed in family.changes.values():
        assert difference(whole_logits(build_family(name, **changed), IDS), logits) > SHOWS
    if "window" in family.kinds:
        assert any("window" in change or "chunk" in change for change in family.changes)
    mechanisms = set()
    for last, value in OFF.items():
        model = build_family(name)
        found = [p for n, p in model.named_parameters() if n.rpartition(".")[2] == last]
        with torch.no_grad():
            for parameter in found:
                parameter.fill_(value)
        if found:
            mechanisms.add(last)
            assert difference(whole_logits(model, IDS), logits) > SHOWS
    assert ("A_log" in mechanisms) == ("linear" in family.kinds)


@pytest.mark.parametrize("name", FAMILIES)
def test_windows_are_those_of_the_table(name: str) -> None:
    """A token further back than all windows reach matters where a layer sees all, and only there."""
    kinds = FAMILIES[name].kinds
    if set(kinds) != {"window"}:
        return
    model = build_family(name, torch.float64)
    reach = len(kinds) * (WINDOW - 1)  # each layer hands a token's words on by a window at most
    first = len(IDS) - 1 - reach
    for position, matters in ((first, True), (first - 1, False)):
        other = [*IDS]
        other[position] = (other[position] + 1) % VOCAB
        assert (difference(whole_logits(model, other), whole_logits(model, IDS)) > 0) == matters


def test_greedy_tokens_are_those_of_generate() -> None:
    model = build_family("gpt_oss")
    out = model.generate(
        torch.tensor([IDS]), attention_mask=torch.ones(1, len(IDS), dtype=torch.long), max_new_tokens=8, do_sample=False
    )
    assert whole_greedy(model, IDS, 8) == tuple(out[0, len(IDS) :].tolist())
