"""What a device's kernels reach, beside its measured limits."""
