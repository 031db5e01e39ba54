"""Serving images over HTTP: a queue before one `Session`, and what stands on it: OpenAI's API, later a web page."""
