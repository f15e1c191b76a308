"""Measurements against peers: each bench runs ours and the peers in turn, in one run, on the same work."""
