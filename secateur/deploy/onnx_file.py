"""An ONNX file, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.deploy.failures import first_line, require
from secateur.errors import DataError


class OnnxModel:
    """An ONNX file as a function of tensors.

    Args:
        path: The file.
        threads: Threads of one operator; 0 leaves it to ONNX Runtime.

    Raises:
        UsageError: If onnxruntime is not installed.
        DataError: If the file can't be read as ONNX.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        (runtime,) = require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise DataError(f"{path}: ONNX Runtime can't load it ({first_line(error)}).") from error
        self._inputs = [value.name for value in self.session.get_inputs()]

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return every output, for the arguments the network itself takes."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(self._inputs, tensors, strict=True)}
        return [torch.from_numpy(output) for output in self.session.run(None, feed)]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the first output."""
        return self.run(*args, **kwargs)[0]
