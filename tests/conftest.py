"""Settings that hold for every test."""

import gc

from hypothesis import settings

# No timed asserts: how long an example takes says something about the machine, not about the code.
# The same examples every time, so that a change fails for what it changes; `make search` draws others.
settings.register_profile("secateur", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("secateur")


def pytest_collection_finish() -> None:
    """Keep the collector to what tests make: accelerate collects after every stage of a training, through all tests."""
    gc.collect()
    gc.freeze()
