"""Trial prunings: what a graph assumes of the user's code is tried on a cut copy before the graph is handed out."""
