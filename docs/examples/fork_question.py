"""Ask two questions about one text: the second one starts from a fork of the first one's cache.

    python docs/examples/fork_question.py [MODEL]

With ``query`` the cache of APB is conditioned on the first question, and the answer to the second one says so. The
compressor ``expected`` needs no question, so its cache serves every question alike.
"""

from __future__ import annotations

import sys

from apb import Engine

TEXT = "The ferry leaves at nine. The baker opens at six. The museum is closed on Mondays. " * 20
QUESTIONS = ("When does the ferry leave?", "When is the museum closed?")


def main(model: str = "smollm2-135m") -> None:
    """Print both answers, from a cache of the first question and from a cache of none."""
    with Engine.launch(model, cluster="virtual", hosts=3, strategy="apb", compress="query") as engine:
        first = engine.prefill(context=TEXT, query=QUESTIONS[0])
        sys.stdout.write(f"{engine.generate(first, max_new_tokens=16).text}\n")
        second = first.fork(query=QUESTIONS[1])  # only the question runs, the text is not prefilled again
        answer = engine.generate(second, max_new_tokens=16)
        sys.stdout.write(f"{answer.text} (the cache was made for: {answer.metrics['conditioned_on']})\n")

    with Engine.launch(model, cluster="virtual", hosts=3, strategy="apb", compress="expected") as engine:
        context = engine.prefill(context=TEXT)
        for question in QUESTIONS:
            handle = context.fork(query=question)
            sys.stdout.write(f"{engine.generate(handle, max_new_tokens=16).text} (made for: {handle.conditioned_on})\n")
            handle.release()


if __name__ == "__main__":
    main(*sys.argv[1:])
