"""Files: tensors of small heads on disk."""
