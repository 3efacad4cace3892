"""Which layers are trained, and by which method."""
