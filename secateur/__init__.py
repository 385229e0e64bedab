"""Secateur makes trained PyTorch CNNs smaller and faster by removing redundant filters."""
