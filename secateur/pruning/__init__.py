"""Scores, a target and costs become a plan, a smaller network, and the proof that nothing else has changed."""
