"""In which precision, and in which order in memory, training computes: decided once, at the start of a run."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.errors import UsageError
from secateur.network.copies import replica
from secateur.network.inputs import arguments, mapped, tensors_of, varied
from secateur.network.isolation import left_as_found

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PRECISIONS = tuple(_DTYPES)
"""What training can compute in."""

_ROUNDING = 1e-4
"""Share of an output's largest value by which the memory formats may differ: sums of fp32 in another order."""


@dataclass(frozen=True)
class Arithmetic:
    """How a stage of training computes; weights, optimizer, losses and evaluation stay in fp32.

    Raises:
        UsageError: If the precision is unknown.
    """

    precision: str = "fp32"
    """What convolutions and matrix products of the forward and backward pass compute in, by autocast: ``fp32``,
    ``bf16`` or ``fp16``."""
    channels_last: bool = False
    """Whether weights of 2-d convolutions lie in memory with the channels last while they are trained; feature maps
    follow, from the first convolution on. Stages of a network with a layer that :func:`overruns` stay contiguous."""
    reason: str = ""
    """Why, where it was decided and not asked for."""

    def __post_init__(self) -> None:
        """Refuse an unknown precision."""
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision: is one of {', '.join(PRECISIONS)}, found {self.precision!r}.")

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context in which a network is run forward."""
        return torch.autocast(device.type, _DTYPES[self.precision], enabled=self.precision != "fp32")

    def widened(self, output: Any) -> Any:
        """Return a network's outputs in fp32, in which losses are computed."""
        return output if self.precision == "fp32" else mapped(output, _wide)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def lay_out(*models: nn.Module, channels_last: bool) -> list[tuple[nn.Parameter, tuple[int, ...]]]:
    """Lay the weights of 2-d convolutions out in memory for a stage of training, in place; values and names stay.

    With the channels last where asked. Where a layer would make oneDNN write past its memory (see :func:`overruns`),
    all weights are laid out contiguously instead, also those that came with the channels last. Weights that are
    computed (weight norm, a mask) or views of others are left as they are.

    Returns:
        The weights that were laid out anew, each with its strides before, for :func:`lay_back`.
    """
    modules = [module for model in models for module in model.modules()]
    wanted = torch.channels_last if channels_last else None
    if any(overruns(module) for module in modules):
        wanted = torch.contiguous_format
    changed: list[tuple[nn.Parameter, tuple[int, ...]]] = []
    for module in modules:
        weight = module._parameters.get("weight") if isinstance(module, nn.Conv2d) else None
        if wanted is None or weight is None or is_lazy(weight):
            continue
        if not any(weight.is_contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last)):
            continue
        before, after = weight.stride(), torch.empty_like(weight, device="meta", memory_format=wanted).stride()
        # A kernel of 1×1 is contiguous in both formats, and oneDNN goes by the strides.
        if before != after:
            weight.data = _strided(weight.data, after)
            changed.append((weight, before))
    return changed


def lay_back(changed: Iterable[tuple[nn.Parameter, tuple[int, ...]]]) -> None:
    """Undo :func:`lay_out`."""
    for weight, before in changed:
        weight.data = _strided(weight.data, before)


def _strided(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def overruns(module: nn.Module) -> bool:
    """Say whether a layer's backward pass may write past its memory where channels are last.

    A strided convolution with a kernel of 1×1, without padding, that reads fewer channels than one vector holds (8
    with AVX2, 16 with AVX512), as the shortcut of a pruned residual network may: oneDNN's gradient of its weight
    reserves too little memory on x86 (oneDNN issue 6035, found in PyTorch 2.14), and the process ends in
    ``free(): invalid pointer`` or goes on with damaged values.
    """
    lanes = 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
        and module.in_channels < lanes
    )


def decide(
    model: nn.Module,
    example_inputs: Any,
    device: torch.device,
    precision: str = "auto",
    channels_last: bool | Literal["auto"] = "auto",
) -> Arithmetic:
    """Decide in what training computes. What is asked for is taken as it is, without a trial.

    The rule for ``auto``, where a network with 2-d convolutions is called on a batch of images on an x86 CPU:
    channels-last where the CPU has AVX2 and PyTorch has oneDNN; bf16 where the CPU has AVX512-BF16, as all with AMX
    do. Everywhere else fp32 and contiguous weights. What the rule says is tried on a copy of the network: if it fails,
    as ``x.view(n, -1)`` does on maps whose channels are last, or computes something else, it is trained plainly.

    Args:
        model: Left as found.
        example_inputs: A tensor, a tuple or a dict that it is called on.
        device: Where it is trained.
        precision: ``auto`` or one of :data:`PRECISIONS`.
        channels_last: ``auto``, or whether.

    Returns:
        The decision, with its reason where there was one to take.

    Raises:
        UsageError: If the precision is unknown.
    """
    if precision != "auto" and channels_last != "auto":
        return Arithmetic(precision, channels_last)
    layout, fast, reason = _rule(model, example_inputs, device)
    precision = fast if precision == "auto" else precision
    if channels_last == "auto":
        why = _why_not(model, example_inputs, "fp32", True) if layout else None
        channels_last = layout and why is None
        reason += "" if why is None else f"; contiguous, as in channels-last the network {why}"
    if fast == precision == "bf16":
        why = _why_not(model, example_inputs, precision, channels_last)
        precision = "bf16" if why is None else "fp32"
        reason += "" if why is None else f"; fp32, as in bf16 the network {why}"
    return Arithmetic(precision, channels_last, reason)


def _rule(model: nn.Module, example_inputs: Any, device: torch.device) -> tuple[bool, str, str]:
    """Return whether the channels go last, the precision, and why; by the machine and the kind of network alone."""
    args, kwargs = arguments(example_inputs)
    # A detector's list of images, each of a size of its own, is no batch.
    images = any(isinstance(v, Tensor) and v.ndim == 4 and v.is_floating_point() for v in (*args, *kwargs.values()))
    if not images or not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return False, "fp32", "no 2-d convolutions on a batch of images"
    if device.type != "cpu":
        return False, "fp32", f"{device.type}: which is faster was not measured"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False, "fp32", f"CPU with {capability}: which is faster was not measured"
    # torch.cpu.get_capabilities, which is public, is younger than the oldest torch that is supported.
    bf16 = capability != "AVX2" and torch.cpu._is_avx512_bf16_supported()
    return True, "bf16" if bf16 else "fp32", f"CPU with {capability}, {'with' if bf16 else 'without'} AVX512-BF16"


def _why_not(model: nn.Module, example_inputs: Any, precision: str, channels_last: bool) -> str | None:
    """Say what goes wrong where a copy of a network computes in a way, compared with fp32; None where nothing does."""
    copied = replica(model).eval()
    args, kwargs = arguments(varied(example_inputs))
    asked = Arithmetic(precision)
    device = next(copied.parameters()).device

    def outputs(way: Arithmetic) -> list[Tensor]:
        torch.manual_seed(0)
        with way.autocast(device):
            return [t.float() for t in tensors_of(copied(*args, **kwargs)) if t.is_floating_point()]

    with left_as_found(copied):
        expected = outputs(Arithmetic())
        try:
            if channels_last:
                lay_out(copied, channels_last=True)
            found = outputs(asked)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            return f"fails: {' '.join(str(error).split()) or type(error).__name__}"
    for before, after in zip(expected, found, strict=True):
        if not bool(after.isfinite().all()):
            return "overflows"
        if precision == "fp32" and float((before - after).abs().max()) > _ROUNDING * float(before.abs().max()):
            return "computes something else"
    return None
