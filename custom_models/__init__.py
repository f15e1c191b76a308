"""The transformer family from scratch, each piece checked against the real thing."""
