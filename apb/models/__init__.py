"""Models: from a name to a folder, from a folder to a loaded model, and the adapter that swaps its attention.

Importing this package does not import transformers; the functions do when they are called.
"""

from apb.models.fetch.resolve import resolve
from apb.models.loading import generation_stop_ids, load_config, load_model, load_tokenizer

__all__ = ["generation_stop_ids", "load_config", "load_model", "load_tokenizer", "resolve"]
