"""The web page: templates filled on the server, a little script that makes them live."""
