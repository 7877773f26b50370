"""The `corsa` command."""
