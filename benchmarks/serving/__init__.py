"""What a new set costs running streams, and a soak; see `__main__.py` and `soak.py`."""
