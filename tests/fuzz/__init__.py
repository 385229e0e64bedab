"""Damaged and hostile files, drawn by seed: mutants of whole ones, and what may come of reading them."""
