"""How long running streams wait while a set of adapters is merged."""
