"""torchrun: one host a process."""
