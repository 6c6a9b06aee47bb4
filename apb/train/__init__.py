"""Training of the small heads, without any command line: prompts, labels, fits, held-out scores."""
