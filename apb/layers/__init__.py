"""Layer kinds: how a layer mixes tokens, its sizes as data and its work over hosts; one file a kind."""
