"""Plans and rates to times: no device needed."""
