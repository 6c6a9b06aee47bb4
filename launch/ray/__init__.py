"""Ray: one actor a host, on this machine or on a cluster."""
