"""Deployment: exported files, and the time and memory that a network takes on this machine."""
