"""A program for torchrun's processes: engines on all ranks and on one, failing hosts, and what then works."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from apb.engine.engine import Engine
from apb.engine.requests import prefill_request
from burst.errors import UserError
from tests.support.tiny import random_ids

HOSTS = 2
EXACT = ("ring", "burst", "allgather", "ulysses", "usp")
CONTEXT, QUESTION = random_ids(401, 4), random_ids(9, 5)


def answer(engine: Engine) -> dict[str, Any]:
    """Prefill and generate; return everything that must not depend on the cluster."""
    layers: list[int] = []
    handle = engine.prefill(list(CONTEXT), list(QUESTION), chat=False, on_layer=lambda done, total: layers.append(done))
    logits = engine.logits(handle).tolist()
    result = engine.generate(handle, max_new_tokens=6)
    return {
        "logits": logits,
        "token_ids": list(result.token_ids),
        "bytes_by_kind": result.metrics["bytes_by_kind"],
        "layers": layers,
    }


def failing(engine: Engine, victim: int) -> dict[str, Any]:
    """Give one host a token that does not exist, so that it stops where the other waits for it."""
    prompt = engine.setup.prompt(list(CONTEXT), list(QUESTION), chat=False)
    plan = engine.setup.plan(prompt)
    requests = [prefill_request("broken", prompt, plan, engine.setup.compressor, rank) for rank in range(HOSTS)]
    requests[victim] = dataclasses.replace(requests[victim], block_ids=(1_000_000, *requests[victim].block_ids[1:]))
    start = time.monotonic()
    try:
        engine.cluster.call("prefill", [(request,) for request in requests])
    except Exception as error:
        return {"type": type(error).__name__, "after_s": time.monotonic() - start}
    return {"type": None}


def main(model: str, out: str) -> None:
    """Run everything on rank 0 and write down what came of it."""
    found: dict[str, Any] = {}
    with Engine.launch(model, hosts=HOSTS, cluster="torchrun", timeout_s=60.0) as engine:
        found["all"] = answer(engine)
        for name in EXACT:
            found[name] = answer(Engine(engine.setup.using(name), engine.cluster))
        try:
            Engine.launch(model, hosts=HOSTS, cluster="torchrun")
        except UserError as error:
            found["second"] = str(error)
        for victim in range(HOSTS):
            found[f"failing {victim}"] = failing(engine, victim)
            found[f"after {victim}"] = answer(engine)
        found["epoch"] = engine.cluster.epoch
    with Engine.launch(model, hosts=1, strategy="full", cluster="torchrun") as engine:
        found["alone"] = answer(engine)
    with Engine.launch(model, hosts=HOSTS, cluster="torchrun", timeout_s=50.0) as engine:
        found["again"] = answer(engine)
    try:
        Engine.launch(model, hosts=HOSTS + 1, cluster="torchrun")
    except UserError as error:
        found["too many"] = str(error)
    sys.stdout.write("done\n")
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
