"""A page and an HTTP API for the same engine: an optional extra, `pip install ".[web]"`."""
