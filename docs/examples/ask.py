"""Ask a question about a long text that four hosts share, all of them in this process.

    python docs/examples/ask.py                                          # the embedded model, a short text
    python docs/examples/ask.py --model org/name --document book.txt --question "Who wrote the letter?"

The first run fetches the embedded model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from apb import Engine

TEXT = "The ferry leaves at nine. The baker opens at six. The museum is closed on Mondays. " * 20
FACT = "The secret number of the lighthouse is 7391846. "


def main(argv: list[str] | None = None) -> str:
    """Print what the model says, as it comes, and what it cost; return the answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--document", type=Path)
    parser.add_argument("--question", default="What is the secret number of the lighthouse?")
    parser.add_argument("--hosts", type=int, default=4)
    given = parser.parse_args(argv)
    document = given.document.read_text() if given.document else TEXT + FACT + TEXT

    with Engine.launch(given.model, cluster="virtual", hosts=given.hosts, strategy="apb") as engine:
        handle = engine.prefill(context=document, query=given.question)
        answer = engine.generate(handle, max_new_tokens=32, on_token=sys.stdout.write)
        sys.stdout.write(f"\n{handle.metrics['context_tokens']} tokens, {handle.metrics['bytes_sent']} bytes sent\n")
    return answer.text


if __name__ == "__main__":
    main()
