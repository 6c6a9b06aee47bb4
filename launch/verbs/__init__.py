"""Verbs: the commands of ``apb``."""
