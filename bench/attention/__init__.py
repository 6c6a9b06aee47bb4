"""Exact attention over ranks beside one dense call and public peers: ``apb bench attention``."""
