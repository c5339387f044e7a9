"""Each benchmark is one command, `python -m benchmarks.NAME`, that writes its results."""
