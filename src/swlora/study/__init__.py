"""Comparisons: arms and seeds, their controls, and what came out, with intervals."""
