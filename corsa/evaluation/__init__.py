"""Asks an edited model, matches its answers, and computes metrics: `predict`, `matching`, `metrics`."""
