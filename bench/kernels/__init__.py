"""Rates of a device's kernels beside its measured limits."""
