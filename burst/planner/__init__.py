"""Prediction: topology, programs on a clock, and the schedule with the shortest predicted time."""
