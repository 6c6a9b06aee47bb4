"""The work of the trainings."""
