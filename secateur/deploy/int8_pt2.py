"""A file of torch.export in int8, by PyTorch's PT2E flow, which torchao holds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.deploy.failures import first_line, quiet, require
from secateur.deploy.int8_onnx import Call
from secateur.deploy.program import Runner, batch_of, program_of, resized, tensors, write_pt2

_FLOW = "torchao.quantization.pt2e"
_OWN = "quantized_decomposed"
"""Name space of the operators that quantise and dequantise."""


def quantise(source: Path, target: Path, calls: Sequence[Call], example: Call, dynamic: bool) -> int:
    """Quantise a program for x86: weights int8 a channel, activations uint8 with ranges from histograms.

    Activations take 7 bits (``reduce_range``): sums of two products of uint8 and int8 saturate on processors without
    VNNI. The file holds the weights in int8, and the network in operators that quantise and dequantise, which any
    machine runs, slowly; oneDNN's layers in int8 take their place by :func:`lowered`, or torch.compile.

    Args:
        source: The fp32 file.
        target: The int8 file.
        calls: Arguments to calibrate on.
        example: Arguments to export with.
        dynamic: Whether the file takes any batch size.

    Returns:
        How many layers were quantised.

    Raises:
        UsageError: If torchao is not installed.
    """
    flow, x86 = _torchao("quantize_pt2e", "quantizer.x86_inductor_quantizer")
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(source).module()
        _tell_apart(program)
        chosen = x86.get_default_x86_inductor_quantization_config(reduce_range=True)
        prepared = flow.prepare_pt2e(program, x86.X86InductorQuantizer().set_global(chosen))
        for args, kwargs in calls:
            prepared(*args, **kwargs)
        network = flow.convert_pt2e(prepared)
        _drop_unused(network)
        size = batch_of(example)
        args, kwargs = resized(example, size, 2) if dynamic and size == 1 else example
        write_pt2(program_of(network, args, kwargs, dynamic), target)
    return sum(_OWN in str(node.target) for node in network.graph.nodes)


def load(path: Path) -> Runner:
    """Return a file as a function, by the operators that it holds."""
    _torchao("quantize_pt2e")  # the operators are its own
    module = torch.export.load(path).module()
    return lambda *args, **kwargs: tensors(module(*args, **kwargs))


def lowered(path: str | Path, example_inputs: Any) -> Any:
    """Load an int8 ``.pt2`` file for this processor, with oneDNN's layers in int8, for one batch size.

    Args:
        path: The file.
        example_inputs: Positional arguments, of the batch size that it is to run at.

    Returns:
        The network, a module that takes the same arguments.

    Raises:
        UsageError: If torchao is not installed.
    """
    _, lowering = _torchao("quantize_pt2e", "lowering")
    with quiet(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = torch.export.load(path).module()
        network = lowering.lower_pt2e_quantized_to_x86(module, tuple(example_inputs))
        for node in network.graph.nodes:
            if node.target == torch.ops.aten.view.default:
                # Layers in int8 return their channels last, which a view can't always flatten.
                node.target = torch.ops.aten.reshape.default
            if node.target == torch.ops.onednn.qconv2d_pointwise.binary:
                # A convolution adds into what its shortcut holds, and takes no shortcut whose channels lie apart.
                with network.graph.inserting_before(node):
                    layout = {"memory_format": torch.channels_last}
                    shortcut = network.graph.call_function(torch.ops.aten.clone.default, (node.args[6],), layout)
                node.args = (*node.args[:6], shortcut, *node.args[7:])
        network.recompile()
    return network


def fast(path: Path, runner: Runner, call: Call) -> tuple[Runner, str]:
    """Return what is timed of a file: lowered for this processor where it is in int8 and that is possible."""
    if not any(_OWN in str(node.target) for node in torch.export.load(path).graph.nodes):
        return runner, ""
    args, kwargs = call
    try:
        if kwargs:
            raise TypeError("it takes keyword arguments")
        network = lowered(path, args)
        with torch.no_grad():
            network(*args)
    except Exception as error:  # noqa: BLE001 - the passes of torch and torchao raise anything
        return (
            runner,
            f"timed as it is in the file, since torchao can't lower it to layers in int8 ({first_line(error)})",
        )
    return lambda *args: tensors(network(*args)), ""


def _torchao(*names: str) -> list[Any]:
    """Import parts of the flow; importing some of them logs at length."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require(*(f"{_FLOW}.{name}" for name in names), extra="int8")


def _tell_apart(network: torch.fx.GraphModule) -> None:
    """Give every operator a source of its own: torchao takes all calls of one module, such as a ReLU, for one layer."""
    for node in network.graph.nodes:
        if node.meta.get("nn_module_stack"):
            *outer, (key, (name, kind)) = node.meta["nn_module_stack"].items()
            node.meta["nn_module_stack"] = {**dict(outer), key: (f"{name}:{node.name}", kind)}


def _drop_unused(network: torch.fx.GraphModule) -> None:
    """Delete the weights in fp32, which nothing reads any longer and the file would hold beside those in int8."""
    used = {node.target for node in network.graph.nodes if node.op == "get_attr"}
    for name, _ in [*network.named_parameters(), *network.named_buffers()]:
        if name not in used:
            where, _, leaf = name.rpartition(".")
            delattr(network.get_submodule(where), leaf)
