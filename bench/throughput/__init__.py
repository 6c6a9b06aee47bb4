"""Prefill and decode rates on real clusters."""
