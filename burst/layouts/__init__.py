"""Layouts: who holds which tokens, and which of them see one another."""

from burst.layouts.layout import Layout, layout

__all__ = ["Layout", "layout"]
