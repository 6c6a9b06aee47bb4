"""KV: the sharded cache of keys and values."""
