"""Settings that hold for every test."""

import sys
from types import SimpleNamespace

from hypothesis import settings

# No timed asserts: how long an example takes says something about the machine, not about the code.
# The same examples every time, so that a change fails for what it changes; `make search` draws others.
settings.register_profile("secateur", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("secateur")


def collect_no_garbage() -> None:
    """Have Accelerate collect no garbage at the end of each stage of training, which takes longer than a stage here."""
    from accelerate.utils import memory

    vars(memory)["gc"] = SimpleNamespace(collect=int)


def pytest_collection_finish() -> None:
    if "secateur.training.stages" in sys.modules:
        collect_no_garbage()
