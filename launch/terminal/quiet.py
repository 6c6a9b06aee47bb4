"""Keeps off stderr what libraries say that nobody can act on, and off stdout whatever they print."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from launch.terminal.streams import Lasting

_LIBRARIES = ("transformers", "huggingface_hub", "torch", "ray", "filelock", "httpx", "asyncio")


@contextlib.contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Send what is printed to stderr and, unless ``verbose``, silence the libraries' warnings."""
    # Tokenizers warn about every fork after they were used; hosts never tokenise in parallel.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stream: Any = Lasting(sys.stderr)
    loggers = [] if verbose else [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(stream), warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
