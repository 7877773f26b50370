"""Estimates before a run: memory on each GPU, whether it fits, and the running time."""
