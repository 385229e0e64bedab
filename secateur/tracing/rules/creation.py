"""Rules for tensors that the code makes from sizes alone, and for operators that read sizes and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np

from secateur.tracing.call import Call
from secateur.tracing.labels import Axes
from secateur.tracing.rules.registry import rule


@rule("aten::zeros", "aten::ones", "aten::full", "aten::empty", "aten::rand", "aten::randn", "aten::new_zeros",
      "aten::new_ones", "aten::new_full", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided",
      "aten::zeros_out")  # fmt: skip
def created(call: Call, *_: Any, **__: Any) -> Axes:
    """Give every dimension labels of its own: its size is taken to follow whatever it meets."""
    axes = {d: call.fresh(size) for d, size in enumerate(call.out.shape) if size > 1}
    if axes:
        call.assume(np.concatenate(list(axes.values())), "has a size written in the code", "follow")
    return axes
