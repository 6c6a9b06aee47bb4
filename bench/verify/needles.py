"""One needle in noise: what ``apb`` finds, per length and number of hosts."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from apb.engine.engine import Engine
from apb.engine.options import EngineOptions
from apb.engine.setup import Setup
from bench.haystack import haystack
from bench.verify.runner import Recorder

LENGTHS, HOSTS, DEPTHS = (1000, 2000, 4000, 7000), (4, 8), 20
CELL, TOTAL = 18 / 20, 0.95  # shares that must be found


def check(recorder: Recorder, model: str, strategy: str = "apb") -> dict[str, Any]:
    """Ask for a 7-digit number at 20 random depths in each cell; decoding goes on on one gathered host."""
    cells = {}
    for hosts in HOSTS:
        setup = Setup.make(EngineOptions(model, hosts=hosts, strategy=strategy, device="cpu", dtype="float32"))
        with Engine.launch(setup) as engine:
            for tokens in LENGTHS:
                for i in range(DEPTHS):
                    key = f"needles/{strategy}/{hosts}/{tokens}/{i}"
                    recorder.sample(key, partial(_one, engine, tokens, i))
                found = [row["ok"] for row in recorder.rows(f"needles/{strategy}/{hosts}/{tokens}/")]
                cells[f"{hosts} hosts, {tokens} tokens"] = sum(found) / len(found)
    share = sum(cells.values()) / len(cells)
    return {"ok": min(cells.values()) >= CELL and share >= TOTAL, "found": round(share, 4), "cells": cells}


def _one(engine: Engine, tokens: int, seed: int) -> dict[str, Any]:
    depth = random.Random(1000 * tokens + seed).random()
    stack = haystack(engine.setup.tokenizer, tokens, depth, seed)
    handle = engine.prefill(stack.ids, stack.question)
    gathered = handle.gather(0)
    handle.release()
    answer = engine.generate(gathered, 32)
    gathered.release()
    return {"ok": stack.answer in answer.text, "depth": round(depth, 3), "answer": stack.answer, "text": answer.text}
