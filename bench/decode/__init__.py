"""How fast and how far decoders get: accepted lengths, times, trees against chains."""
