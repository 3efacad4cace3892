"""The web page and the API: a thin skin over one model that one thread owns."""
