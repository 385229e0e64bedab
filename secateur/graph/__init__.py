"""Plain data: the coupled channels of a network, what a plan keeps of them, and what both cost."""
