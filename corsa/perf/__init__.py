"""Measurements of speed and memory, as JSON."""
