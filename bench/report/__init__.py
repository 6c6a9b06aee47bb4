"""README's tables and figure, made from dated results."""
