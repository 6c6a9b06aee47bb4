"""Prose that every Python has: its language reference."""

from __future__ import annotations

import functools
import re


@functools.cache
def reference() -> str:
    """Return the language reference as it is."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@functools.cache
def prose() -> str:
    """Return it without its markup's long lines."""
    return re.sub(r"[*=\-^~+|]{3,}", "", reference())
