"""bitlaw."""
