"""Prediction: clusters' topology, programs on a clock, and the schedule that would be fastest."""
