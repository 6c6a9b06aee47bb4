"""Draft heads and draft vocabularies: what guesses the tokens that the target then verifies."""

from __future__ import annotations

from apb.draft.base import DraftHead, Target
from apb.draft.files import load, save, shipped

__all__ = ["DraftHead", "Target", "load", "save", "shipped"]
