"""Decoders side by side: accepted lengths, times, trees against chains."""
