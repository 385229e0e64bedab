"""Settings that hold for every test."""

from hypothesis import settings

# No timed asserts: how long an example takes says something about the machine, not about the code.
settings.register_profile("secateur", deadline=None)
settings.load_profile("secateur")
