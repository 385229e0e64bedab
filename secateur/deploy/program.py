"""A network as a program of torch.export, and as a file of it: ``.pt2`` or ONNX."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.deploy.failures import blame, quiet, root_cause
from secateur.deploy.onnx_file import OnnxModel
from secateur.errors import ExportError, UsageError
from secateur.network.inputs import are_images

Runner = Callable[..., list[Tensor]]
"""Takes a network's positional and keyword arguments, returns its output's tensors in order."""


def program_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> Any:
    """torch.export of the network; whatever fails in it is blamed on an operator and a line."""
    shapes = _named_shapes(model, args, kwargs) if dynamic else None
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # anything the network or the tracer raises
        if dynamic and "batch" in str(error) and type(error).__name__ in ("UserError", "ConstraintViolationError"):
            constant = re.search(r"constant \((\d+)\)", str(error))
            found = f"its code makes it the constant {constant.group(1)}" if constant else root_cause(error)
            raise ExportError(
                f"The network fixes its batch size ({found}). Pass dynamic_batch=False "
                "(--fixed-batch) to export it for the example's batch only."
            ) from error
        operator, line = blame(error)
        cause = root_cause(error)
        if "DataDependent" in type(error).__name__ or "data-dependent" in cause:
            operator, cause = operator or "aten.item", "Python code there branches on the values of a tensor"
        raise ExportError(
            f"{line or type(model).__name__}: {operator or 'the network'} can't be exported: {cause}."
        ) from error


def _named_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dynamic shapes as torch.export wants them: in order, or with keyword arguments by name of parameter."""
    positional, keyword = _dynamic_shapes((args, kwargs))
    if not keyword:
        return positional
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, positional, strict=False)), **keyword}


def write_pt2(program: Any, part: Path) -> Callable[[], Runner]:
    """Write a program as ``.pt2``, without the inputs it was made from; return what loads it again."""
    program.example_inputs = None
    torch.export.save(program, part)

    def load() -> Runner:
        module = torch.export.load(part).module()
        return lambda *args, **kwargs: tensors(module(*args, **kwargs))

    return load


def write_onnx(program: Any, part: Path) -> Callable[[], Runner]:
    """Write a program as ONNX; return what loads it again."""
    try:
        with quiet():
            torch.onnx.export(program, (), str(part), dynamo=True, external_data=False, verbose=False)
    except Exception as error:  # the exporter's passes raise anything
        operator, line = blame(error, program)
        raise ExportError(
            f"{line or 'The network'}: {operator or 'an operator'} can't be exported to ONNX: {root_cause(error)}."
        ) from error
    return lambda: OnnxModel(part).run


def batch_of(call: tuple[Any, Any]) -> int:
    """Return the number of examples in the arguments of a call."""
    for leaf in pytree.tree_leaves(call, is_leaf=are_images):
        if are_images(leaf):
            return len(leaf)
        if isinstance(leaf, Tensor) and leaf.dim():
            return int(leaf.shape[0])
    raise UsageError("The example inputs hold no tensor with a batch dimension, so there is nothing to run.")


def resized(call: tuple[Any, Any], size: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat or cut every tensor, and every list of images, of batch size ``size`` to ``batch``."""

    def resize(leaf: Any) -> Any:
        if are_images(leaf):
            return [leaf[i % size] for i in range(batch)] if len(leaf) == size else leaf
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != size:
            return leaf
        return leaf[torch.arange(batch, device=leaf.device) % size]

    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(resize, call, is_leaf=are_images)
    return found


def _dynamic_shapes(call: tuple[Any, Any]) -> tuple[Any, Any]:
    size, dimension = batch_of(call), torch.export.Dim("batch", min=1)

    def shape(leaf: Any) -> Any:
        return {0: dimension} if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size else None

    shapes: tuple[Any, Any] = pytree.tree_map(shape, call)
    return shapes


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
