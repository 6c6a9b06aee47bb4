"""Layouts: the tokens of each rank, and the pairs of them that see one another."""

from burst.layouts.layout import Layout, layout

__all__ = ["Layout", "layout"]
