"""A web page and an HTTP API for the same engine; optional: `pip install ".[web]"`."""
