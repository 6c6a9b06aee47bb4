"""Benchmarks by name: one file each, or another package's (entry points of the group ``bench.benchmarks``)."""
