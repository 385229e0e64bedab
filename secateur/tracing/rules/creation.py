"""Rules for tensors that the code makes from sizes alone, and for operators that read sizes and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from secateur.tracing.flow import Flow
from secateur.tracing.rules.registry import rule


@rule("aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::rand", "aten::randn", "aten::new_zeros",
      "aten::new_ones", "aten::new_full", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided",
      "aten::zeros_out")  # fmt: skip
def created(flow: Flow, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Give every dimension labels of its own: its size is taken to follow whatever it meets."""
    axes = {d: flow.store.fresh(size) for d, size in enumerate(out.shape) if size > 1}
    if axes:
        flow.assume(np.concatenate(list(axes.values())), "has a size written in the code", "follow")
        flow.set(out, axes)
