"""Fused kernels, written in Triton."""
