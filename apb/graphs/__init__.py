"""Graphs: steps of decoding captured once and replayed."""
