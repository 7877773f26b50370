"""Building blocks of the pipelines."""
