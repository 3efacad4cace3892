"""Linear maps: how their products are computed, and the copies of weights that this takes."""
