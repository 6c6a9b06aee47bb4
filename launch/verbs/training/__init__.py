"""Trainings: ``apb train NAME``."""
