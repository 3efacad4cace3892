"""What several tests build or measure with, a module a topic."""
