"""Side by side with peers: one command each, results in ``docs/benchmarks.md``."""
