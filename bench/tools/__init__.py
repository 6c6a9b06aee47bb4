"""Tools that benchmarks share: rows on disk, conditions, times, prompts, prose, output."""
