"""What sets the project up and tries it; only Python's own library is needed to begin."""
