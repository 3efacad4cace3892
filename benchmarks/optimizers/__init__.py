"""Optimisers that know that the A and B of an adapter are one matrix."""
