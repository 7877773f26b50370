"""MEMIT (Meng et al. 2023)."""
