"""Experiments in the code domain."""
