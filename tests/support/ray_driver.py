"""A program that uses Ray hosts in a process of its own: joins a cluster, is interrupted, or is killed."""

from __future__ import annotations

import json
import sys
from typing import Any

from apb.clusters import launcher
from apb.engine.engine import Engine
from launch.terminal.interrupt import interruptible
from tests.support.torchrun_driver import CONTEXT, QUESTION, answer

LONG = tuple(range(2000)) * 20  # tokens, enough to be in the middle of it for seconds


def say(**document: Any) -> None:
    """Tell the test something."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def main(model: str, what: str, address: str = "") -> None:
    """Start hosts, say their processes, and do ``what``."""
    ray = launcher("ray", address=address or None)
    # As the commands do: Python drops an interrupt that falls into a callback, of Ray's, say.
    with interruptible(), Engine.launch(model, hosts=2 if what == "answer" else 1, cluster=ray) as engine:
        cluster: Any = engine.cluster
        say(pids=cluster.pids)
        if what == "answer":
            say(**answer(engine))
        while what == "linger":
            engine.prefill(list(LONG), list(QUESTION), chat=False, on_layer=lambda done, _: say(layer=done))
    say(closed=len(CONTEXT))


if __name__ == "__main__":
    main(*sys.argv[1:])
