"""Benchmarks: ours and a peer on the same work, alternating in one run. `python -m tools.bench`."""
