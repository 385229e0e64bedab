"""Channel shuffles: what they do to labels, and how many channels each of their stretches may lose."""
