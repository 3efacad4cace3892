"""Super weights: candidates, proof, figures."""
