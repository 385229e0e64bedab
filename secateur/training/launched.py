"""The numbers by which what starts several processes (torchrun, accelerate, mpirun) tells each which it is.

They are read before a command knows what it has to do, so that nothing here imports torch.
"""

from __future__ import annotations

import os

_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def process() -> int:
    """Return this process's number among those of a run; the one with 0 writes files, and shows the result.

    The names are those that Accelerate reads, in its order. A process that was started alone has no number, which is 0.
    """
    return next((int(os.environ[name]) for name in _RANK if os.environ.get(name, "").isdecimal()), 0)


def counted() -> bool:
    """Tell whether this process was told how many there are."""
    return any(name in os.environ for name in _WORLD)
