"""A program for torchrun that does not end: each rank leaves its process id, rank 0 says how far it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch.torchrun.start import lead
from tests.support.ray_driver import LONG
from tests.support.torchrun_driver import QUESTION


def main(model: str, folder: str, timeout_s: str) -> None:
    """Prefill again and again, on hosts that do not wait for each other."""
    Path(folder, f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))

    def program() -> int:
        from apb.engine.engine import Engine
        from burst.errors import HostFailure
        from launch.terminal.output import told

        world = int(os.environ["WORLD_SIZE"])
        try:
            with Engine.launch(
                model, hosts=world, strategy="star", cluster="torchrun", timeout_s=float(timeout_s)
            ) as engine:
                while True:
                    engine.prefill(
                        list(LONG),
                        list(QUESTION),
                        chat=False,
                        on_layer=lambda done, _: Path(folder, "layer").write_text(str(done)),
                    )
        except HostFailure as error:
            return told(error)

    sys.exit(lead(program))


if __name__ == "__main__":
    main(*sys.argv[1:])
