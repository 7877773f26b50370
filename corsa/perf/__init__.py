"""What is measured: speed and memory, as JSON."""
