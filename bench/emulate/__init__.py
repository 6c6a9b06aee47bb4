"""Many hosts on one device: measured segments on a timeline."""
