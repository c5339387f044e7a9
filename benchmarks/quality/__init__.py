"""How much of its adapters' skill a merge keeps, on real tasks."""
