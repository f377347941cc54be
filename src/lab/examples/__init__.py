"""Steps and tasks of another kind. Each folder is complete: code, config, a lab note."""
