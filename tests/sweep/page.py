"""The page docs/models.md, from verdicts, and the verdicts that a page holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import transformers

from tests.sweep.verdict import CONTEXT, EXACT, HOSTS, LIMIT, NEW_TOKENS, REJECTED, UNBUILT, WRONG, Verdict

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
VERSION = re.compile(r"transformers (\S+) and torch")

HEAD = """# Models

Every class of causal language models in transformers {transformers}, built at tiny size with random weights and run
through adapter and engine. Made by `python -m tests.sweep > docs/models.md` (a minute) with transformers {transformers}
and torch {torch}. `pytest -m claims tests/claims/test_models.py` runs it again and compares, and a sample runs with
all tests.

- **{exact} exact**: a prompt of {context} tokens over {hosts} hosts (`full` on one, `ring` on several). Logits are
  within {limit:.0e} of transformers' own run over the whole, in fp32, and {tokens} greedy tokens are the same. Layers
  are few but of every sort that the architecture has. Windows and chunks are shorter than a host's block. Norms,
  biases, sinks and decays are drawn at random.
- **{rejected} rejected** when an engine is set up, with the reason.
- **{unbuilt} not built**: transformers itself does not make or run them from a configuration and token ids alone.
- **{wrong} wrong**, which would be a defect.

A checkpoint of an exact class may still be rejected, since its `config.json` may ask for more than is set here,
quantised weights for one.
"""


def page(verdicts: Iterable[Verdict]) -> str:
    """Return the text of docs/models.md."""
    found = sorted(verdicts, key=lambda v: v.model_type)
    count = {verdict: sum(v.verdict == verdict for v in found) for verdict in (EXACT, REJECTED, UNBUILT, WRONG)}
    head = HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        exact=count[EXACT],
        rejected=count[REJECTED],
        unbuilt=count[UNBUILT],
        wrong=count[WRONG],
        context=CONTEXT + 8,
        hosts=f"{', '.join(map(str, HOSTS[:-1]))} and {HOSTS[-1]}",
        limit=LIMIT,
        tokens=NEW_TOKENS,
    )
    rows = [
        "| `model_type` | class | verdict | layers, or the reason | difference |",
        "|---|---|---|---|---|",
        *map(_row, found),
    ]
    return head + "\n" + "\n".join(rows) + "\n"


def _row(v: Verdict) -> str:
    words = v.words.replace("|", "/").replace("<", "(").replace(">", ")")
    return f"| `{v.model_type}` | {v.name} | {v.verdict} | {words} | {f'{v.error:.0e}' if v.verdict == EXACT else ''} |"


def kept() -> Mapping[str, str]:
    """Return the verdict of each type that the page holds; nothing where another transformers made it."""
    text = PAGE.read_text(encoding="utf-8")
    version = VERSION.search(text)
    if version is None or version[1] != transformers.__version__:
        return {}
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("| `"): row[2] for row in rows if len(row) > 3 and row[0] != "| `model_type`"}
