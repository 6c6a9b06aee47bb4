"""Tables and figure of docs/results.md, made from dated results."""
