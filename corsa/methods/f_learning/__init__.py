"""F-Learning (Ni et al. 2024)."""
