"""Write docs/models.md anew: ``python -m tests.sweep > docs/models.md``; with types, only those, without the page."""

from __future__ import annotations

import sys

from tests.sweep.page import page
from tests.sweep.run import architectures, sweep

if __name__ == "__main__":
    chosen = sys.argv[1:]
    found = []
    for verdict in sweep(chosen or list(architectures())):
        found.append(verdict)
        sys.stderr.write(f"{verdict.model_type:28} {verdict.verdict:9} {verdict.error:.0e} {verdict.words}\n")
    if not chosen:
        sys.stdout.write(page(found))
