"""Checks of the numbers that the project claims: ``python -m bench.verify``."""
