"""Knowing beforehand: what a run will hold on each GPU, whether that fits, and how long it will take."""
