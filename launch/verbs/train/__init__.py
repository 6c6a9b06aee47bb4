"""Training verbs: ``apb train NAME``."""
