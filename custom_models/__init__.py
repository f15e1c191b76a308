"""The transformer family written from scratch: each model is checked against the real thing."""
