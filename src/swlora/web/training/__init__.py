"""Trainings that are started from the page: their data, their settings, the process at work."""
