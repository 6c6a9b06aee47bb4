"""All architectures, each in a process of its own that may take so long and no longer."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from apb.models.towers import TOWERS
from tests.sweep.verdict import WRONG, Verdict, judge

UNLISTED = {"mistral4": "Mistral4ForCausalLM"}  # a decoder that transformers only maps as part of a composite
DEADLINE_S = 180.0


def architectures() -> dict[str, str]:
    """Return the class of each type of configuration that has a causal language model or a text tower."""
    towers = {name: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name] for name in TOWERS}
    return dict(sorted({**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **UNLISTED, **towers}.items()))


def sweep(model_types: Sequence[str], processes: int = 2) -> Iterator[Verdict]:
    """Yield the verdicts on these types as they are reached; one that takes too long, or dies, is WRONG."""
    names, waiting = architectures(), list(model_types)
    running: dict[Connection, tuple[str, multiprocessing.Process, float]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            model_type = waiting.pop(0)
            here, there = multiprocessing.Pipe(duplex=False)
            # Forked, since a new process would import transformers again for a dozen seconds.
            process = multiprocessing.get_context("fork").Process(
                target=_judge, args=(there, model_type, names[model_type]), daemon=True
            )
            process.start()
            there.close()
            running[here] = model_type, process, time.monotonic() + DEADLINE_S
        ready = wait(running, timeout=1.0)
        for here, (model_type, process, until) in list(running.items()):
            if here in ready:
                try:
                    verdict = here.recv()
                except EOFError:
                    verdict = Verdict(model_type, names[model_type], WRONG, "its process died")
            elif time.monotonic() > until:
                verdict = Verdict(model_type, names[model_type], WRONG, f"took longer than {DEADLINE_S:.0f} s")
            else:
                continue
            process.kill()
            process.join()
            here.close()
            del running[here]
            yield verdict


def _judge(there: Connection, model_type: str, name: str) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    there.send(judge(model_type, name))
