"""Attention: implementations that stand in for a model's own, during a prefill and over the sharded cache."""
