"""An ONNX file in int8, by ONNX Runtime's static quantisation."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.deploy.failures import quiet, require
from secateur.deploy.onnx_file import OnnxModel
from secateur.deploy.program import Runner

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a network."""


def quantise(source: Path, target: Path, calls: Sequence[Call], example: Call, dynamic: bool) -> int:
    """Quantise a file in the QDQ form: weights int8 a channel, activations uint8 from least to greatest value.

    Weights take 7 bits (``reduce_range``): without VNNI, as on processors of AVX2 alone, ONNX Runtime adds two products
    of uint8 and int8 in 16 bits, which saturate with weights of 8. ResNet-20 so kept 92.1 % of accuracy at 91.8 %, and
    fell to 90.7 % with 8 bits, its output three times as far off; ranges by percentile or entropy were no better.

    Args:
        source: The fp32 file.
        target: The int8 file.
        calls: Arguments to calibrate on.
        example: Not needed here.
        dynamic: Not needed here.

    Returns:
        How many tensors were quantised.

    Raises:
        UsageError: If a package is not installed.
    """
    names = ("onnxruntime.quantization", "onnxruntime.quantization.shape_inference", "onnx")
    quantization, shapes, onnx = require(*names)
    inputs = [value.name for value in OnnxModel(source).session.get_inputs()]
    feeds = iter([dict(zip(inputs, _arrays(call), strict=True)) for call in calls])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined, misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(feeds, None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared = str(Path(folder) / "prepared.onnx")
        shapes.quant_pre_process(str(source), prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            str(target),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    return sum(node.op_type == "QuantizeLinear" for node in onnx.load(str(target)).graph.node)


def load(path: Path) -> Runner:
    """Return a file as a function."""
    return OnnxModel(path, threads=1).run


def fast(path: Path, runner: Runner, call: Call) -> tuple[Runner, str]:
    """Return what is timed of a file: ONNX Runtime runs it in int8 as it is."""
    return runner, ""


def _arrays(call: Call) -> list[Any]:
    return [leaf.detach().cpu().numpy() for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
