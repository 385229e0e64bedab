"""A run as a file: its keys, the models and data that it names, and the run itself."""
