"""The demo: a small embedded model, its adapters, and what they show together."""
