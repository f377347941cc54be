"""Models as plain modules."""
