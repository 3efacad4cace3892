"""Generation in batches: prefill, caches, sampling and beams."""
