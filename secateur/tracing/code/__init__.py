"""What the user's Python code tells without being run."""
