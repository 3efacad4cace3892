"""Where examples come from, and how they become token sequences and prefix trees."""
