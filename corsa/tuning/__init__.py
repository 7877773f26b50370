"""Sweeps: the search space, the study that stores trials, the trials that Ray Tune runs, and the results."""
