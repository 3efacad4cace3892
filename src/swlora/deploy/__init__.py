"""A trained model taken where it runs: merged, as GGUF, packaged, on the Hub, each one proved."""
