"""Sweeps: the space searched, the study that remembers, the trials that Ray Tune runs, and what came of them."""
