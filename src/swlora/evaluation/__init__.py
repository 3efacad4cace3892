"""Generation, scores and reports."""
