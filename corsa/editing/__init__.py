"""Edit, undo, evaluate, merge and push adapters, and keep the history of each."""
