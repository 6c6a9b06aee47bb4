"""Execution: ``burst.attention``, the only place where schedules meet tensors."""
