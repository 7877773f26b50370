"""The engineer's path: edit, undo, evaluate, export, the history of an adapter."""
