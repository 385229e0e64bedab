"""What a run tells of itself while it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """What a run is doing, for progress bars and logs."""

    kind: Literal["stage", "batch", "episode", "milestone"]
    """``stage``: a stage of training begins an epoch; ``batch``: a batch is done; ``episode``, ``milestone``: its
    ``record`` is complete."""
    stage: str
    """``optimise``, ``finetune`` or ``final``."""
    round: int
    phase: int
    epoch: int = 0
    epochs: int = 0
    batch: int = 0
    batches: int | None = None
    loss: float = math.nan
    record: Mapping[str, Any] | None = None


Progress = Callable[[Event], None]
