"""A pruned network and the plans that made it, in one safetensors file that loads into the user's own model class."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from secateur.checkpoint.atomic import write_atomic
from secateur.checkpoint.digest import bits, digest
from secateur.checkpoint.weights import looks_like_safetensors, parse_tensors, read_bytes
from secateur.errors import CheckpointError, PlanError, UsageError
from secateur.graph import plan as plan_form
from secateur.graph.plan import PruningPlan
from secateur.graph.structure import Index, Record, checked, parsed
from secateur.network.copies import replica
from secateur.network.inputs import unwrapped
from secateur.network.named import modules_of
from secateur.pruning.applied import plans_of, require_made_by
from secateur.pruning.part import for_whole
from secateur.pruning.soundness import require_sound
from secateur.pruning.surgery import cut
from secateur.tracing.tracing import trace

FORMAT_VERSION = 2
"""Version of the file's layout; raised when an older reader could misread a newer file. The digest of version 1 is of
the tensors alone; that of version 2 covers the rest of the header, too."""

KEY = "secateur"
"""Key of the safetensors metadata under which the JSON header stands."""


@dataclass(frozen=True)
class Header:
    """What a file holds beside its tensors."""

    model: str
    """Qualified class name of the model."""
    plans: tuple[PruningPlan, ...]
    """In the order in which they were applied; empty for an unpruned network."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the caller stored: JSON values."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Name of a tied tensor -> name under which it is stored."""


def save(
    model: nn.Module,
    plan: PruningPlan | Sequence[PruningPlan] | None = None,
    path: str | os.PathLike[str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a pruned network and its plans to one file, whole or not at all.

    The file is a safetensors file with the model's state dict; its metadata holds, as JSON under the key
    ``secateur``, the format's version, the model's class name, the plans, ``extra``, which names are one tied tensor
    (stored once), and a SHA-256 of the tensors and of all these. Dtypes are kept; memory layouts are not: every tensor
    is stored contiguous. Data parallel and compiled wrappers are taken off.

    Args:
        model: The pruned network.
        plan: The plan that was applied to the original; a sequence where several were, one after another. By default
            those that the network knows: what came out of ``apply``, ``prune``, ``compress`` or ``load`` knows its own,
            also after training. An empty sequence saves the network as if it were unpruned.
        path: File to write; its folder is made if need be.
        extra: Anything to keep beside, as JSON values.

    Raises:
        CheckpointError: If the state dict holds something that safetensors has no form for: a tensor on the meta
            device, sparse, quantised or of a subclass; extra state that is no tensor.
        PlanError: If the plan is not what made the network.
        UsageError: If ``extra`` is no JSON, no path is given, or the place can't be written to.
        RunError: If the disk fails or is full.
    """
    if path is None:
        raise UsageError("save: where to? Pass path=, as in save(model, path='small.safetensors').")
    model = unwrapped(model)
    if isinstance(model, AveragedModel):
        raise UsageError(f"{path}: an AveragedModel is a wrapper of the network; save its averages: save(ema.module).")
    plans = _plans(model, plan, path)
    state = _checked_state(model)
    names = _shared_names(state)
    aliases = {name: first for first, *others in names for name in others}
    tensors = {name: _plain(value) for name, value in state.items() if name not in aliases}
    header = {
        "format_version": FORMAT_VERSION,
        "model": type(model).__qualname__,
        "plans": [p.to_dict() for p in plans],
        "extra": dict(extra or {}),
        "aliases": aliases,
    }
    try:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False)
        header = json.loads(text)
        text = json.dumps({**header, "sha256": _digest(tensors, header)}, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: extra holds something that JSON has no form for: {error}.") from error
    try:
        content = safetensors.torch.save(tensors, {KEY: text})
    except (KeyError, ValueError, SafetensorError) as error:
        kinds = sorted({f"{v.dtype}" for v in tensors.values()})
        raise CheckpointError(f"{path}: a tensor's type can't be stored ({error}); the model holds {kinds}.") from error
    write_atomic(path, content)


def _plans(
    model: nn.Module, plan: PruningPlan | Sequence[PruningPlan] | None, path: str | os.PathLike[str]
) -> list[PruningPlan]:
    if plan is None:
        plan = plans_of(model)
    plans = [plan] if isinstance(plan, PruningPlan) else list(plan)
    try:
        require_made_by(model, plans)
    except PlanError as error:
        raise PlanError(f"{path}: not saved: {error}") from error
    return plans


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    any_class: bool = False,
    prefix: str = "",
    example_inputs: Any = None,
) -> nn.Module:
    """Prune a freshly built original model as a file says, and fill it with the file's weights.

    Args:
        model: The original model, as its class builds it; left as it is. Its weights don't matter, its device is kept.
        path: File that :func:`save` wrote.
        any_class: Take a model of another class too, as long as every tensor fits: for a class that was renamed.
        prefix: Name of the part of the model that the file is for, such as ``backbone.body`` of a detector for a
            classifier's file. That part is pruned and filled, what reads it loses the inputs that go, and the rest
            keeps its weights; tensors of the file that the part lacks are left out.
        example_inputs: Inputs to trace the model on, by which what reads the part is found; needed with ``prefix``.

    Returns:
        A new model of the same class whose state dict equals the saved one bit for bit, dtypes and ties included; with
        ``prefix``, that of the part does.

    Raises:
        CheckpointError: If the file is damaged, not Secateur's, or from a newer version; or if the model is of another
            class, or a tensor's shape, presence or tie differs: the first one is named.
        UsageError: If there is no such file, the model's tensors have no data (meta device, lazy modules), or there is
            no such part, or nothing to trace the model on.
    """
    header, tensors = _read(path)
    model = unwrapped(model)
    _require_data(model, path)
    if prefix:
        return _load_part(model, header, tensors, path, prefix, example_inputs)
    mine = type(model).__qualname__
    if mine != header.model and not any_class:
        raise CheckpointError(
            f"{path}: holds a {header.model}, and the model given is a {mine}; build the class that was pruned."
        )
    _require_original(model, header, path)
    pruned = _apply(model, header.plans, path)
    state = {name: tensors[header.aliases.get(name, name)] for name in [*tensors, *header.aliases]}
    _require_same_tensors(pruned, state, mine, path)
    _fill(pruned, state, header.aliases, path)
    return pruned


def _load_part(
    model: nn.Module,
    header: Header,
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    prefix: str,
    example_inputs: Any,
) -> nn.Module:
    if prefix not in modules_of(model):
        raise UsageError(f"{path}: the {type(model).__name__} given has no part {prefix!r} to load into.")
    if header.plans and example_inputs is None:
        raise UsageError(f"{path}: what reads {prefix} is found by a trace; pass example_inputs=.")
    pruned: nn.Module = model if header.plans else replica(model)
    try:
        for plan in header.plans:
            pruned = cut(pruned, for_whole(plan, trace(pruned, example_inputs), prefix))
    except PlanError as error:
        raise CheckpointError(f"{path}: the plan doesn't fit the part {prefix} of the model given: {error}") from error
    part = pruned.get_submodule(prefix)
    names = [name for name in [*tensors, *header.aliases] if name in part.state_dict()]
    state = {name: tensors[header.aliases.get(name, name)] for name in names}
    _require_same_tensors(part, state, f"{type(model).__name__}'s {prefix}", path)
    _fill(part, state, {name: first for name, first in header.aliases.items() if name in names}, path)
    return pruned


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is one that :func:`save` wrote, of any version, whole or not.

    Raises:
        UsageError: If there is no such file, or it can't be read.
    """
    content = read_bytes(path)
    if not looks_like_safetensors(content):
        return False
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    try:
        found = parsed(header)
    except ValueError:
        # A truncated or damaged header can't be parsed; a tensor of that name would have an object here.
        return re.search(rb'"%s"\s*:\s*"' % KEY.encode(), header) is not None
    metadata = found.get("__metadata__") if isinstance(found, dict) else None
    return isinstance(metadata, dict) and KEY in metadata


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read a file's header, for which no model is needed.

    Raises:
        CheckpointError: If the file is damaged, not Secateur's, or from a newer version.
        UsageError: If there is no such file.
    """
    return _read(path)[0]


def _checked_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict, every value an ordinary tensor with data."""
    state: dict[str, Any] = model.state_dict()
    for name, value in state.items():
        what = None
        if not isinstance(value, Tensor):
            what = f"extra state of type {type(value).__name__}; keep it in `extra`, or in a buffer"
        elif is_lazy(value):
            what = "a lazy parameter without a shape; run the model once"
        elif value.device.type == "meta":
            what = "a tensor on the meta device, without data"
        elif value.layout != torch.strided or value.is_quantized:
            what = f"a tensor of layout {value.layout} and type {value.dtype}; only dense plain tensors can be stored"
        elif type(value) not in (Tensor, nn.Parameter):
            what = f"a {type(value).__name__}; only plain tensors can be stored"
        if what is not None:
            raise CheckpointError(f"{type(model).__name__}: {name} is {what}.")
    return state


def _plain(value: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU, which shares memory with no other tensor."""
    return value.detach().resolve_conj().resolve_neg().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _shared_names(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of each tensor that has several, first name first."""
    names: dict[object, list[str]] = {}
    for name, value in state.items():
        if value.numel():
            names.setdefault(_place(value), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _place(value: Tensor) -> tuple[object, ...]:
    """Return a key that two tensors share if they are the same view of the same memory."""
    return value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride()


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of the tensors' names, dtypes, shapes and bytes in the order of the names.

    The header goes before them, but for the digest itself; of a file of version 1 it doesn't.
    """
    covered = {key: value for key, value in header.items() if key != "sha256"}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":")) if header["format_version"] > 1 else ""
    return digest(text, tensors)


class _Stored(Record):
    """The header as JSON."""

    format_version: Index
    model: str
    plans: list[dict[str, Any]]
    extra: dict[str, Any]
    aliases: dict[str, str]
    sha256: str


def _read(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    content = read_bytes(path)
    tensors = parse_tensors(path, content)
    try:
        text = (parsed(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}).get(KEY)
        if text is None:
            raise CheckpointError(
                f"{path}: a safetensors file, but not one of Secateur's: it holds no plan. Load plain weights into the "
                "model itself."
            )
        given = parsed(text)
        _require_known(given, "format_version", FORMAT_VERSION, "file format", path)
        stored = checked(_Stored, given)
        for plan in stored.plans:
            _require_known(plan, "version", plan_form.FORMAT_VERSION, "plan format", path)
        plans = tuple(PruningPlan.from_dict(plan) for plan in stored.plans)
        lost = next((first for first in stored.aliases.values() if first not in tensors), None)
        if lost is not None:
            raise ValueError(f"aliases: no tensor {lost!r}")
    except (ValueError, PlanError) as error:
        raise CheckpointError(
            f"{path}: the plan in the metadata can't be read ({error}); copy the file again."
        ) from error
    if _digest(tensors, given) != stored.sha256:
        raise CheckpointError(
            f"{path}: damaged: the tensors or the plan aren't the ones that were saved; copy the file again."
        )
    return Header(stored.model, plans, stored.extra, stored.aliases), tensors


def _require_known(given: Any, key: str, newest: int, what: str, path: str | os.PathLike[str]) -> None:
    version = given.get(key) if isinstance(given, dict) else None
    if isinstance(version, int) and version > newest:
        raise CheckpointError(
            f"{path}: written by a newer Secateur ({what} {version}; this one reads up to {newest}); upgrade secateur."
        )


def _require_data(model: nn.Module, path: str | os.PathLike[str]) -> None:
    for name, value in _tensors(model):
        if is_lazy(value) or value.device.type == "meta":
            raise UsageError(
                f"{path}: {name} of the model given has no data (lazy, or on the meta device); build the model on a "
                "real device, and run a lazy one once."
            )


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _require_original(model: nn.Module, header: Header, path: str | os.PathLike[str]) -> None:
    """Compare the model's shapes with those that the first plan was made for."""
    if not header.plans:
        return
    shapes = {name: tuple(value.shape) for name, value in _tensors(model)}
    for name, expected in header.plans[0].shapes.items():
        found = shapes.get(name)
        if found != tuple(expected):
            has = "has no such tensor" if found is None else f"has {found}"
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(expected)} in the {header.model} that was pruned, and the model "
                f"given {has}; build the original model with the same options."
            )


def _apply(model: nn.Module, plans: Sequence[PruningPlan], path: str | os.PathLike[str]) -> nn.Module:
    pruned = replica(model) if not plans else model
    try:
        for plan in plans:
            require_sound(pruned, plan)
            pruned = cut(pruned, plan)
    except PlanError as error:
        raise CheckpointError(f"{path}: the plan doesn't fit the model given: {error}") from error
    return pruned


def _require_same_tensors(
    pruned: nn.Module, state: Mapping[str, Tensor], name: str, path: str | os.PathLike[str]
) -> None:
    own = pruned.state_dict()
    differing = next((n for n in own if n in state and own[n].shape != state[n].shape), None)
    if differing is not None:
        raise CheckpointError(
            f"{path}: {differing} has shape {tuple(state[differing].shape)} in the file and "
            f"{tuple(own[differing].shape)} in the {name} given; build the original model with the same options."
        )
    missing, unknown = [n for n in own if n not in state], [n for n in state if n not in own]
    if missing or unknown:
        parts = [
            f"{len(names)} tensor{'s' * (len(names) > 1)} {what} (first: {names[0]})"
            for names, what in ((missing, "of the model not in the file"), (unknown, "of the file not in the model"))
            if names
        ]
        raise CheckpointError(
            f"{path}: not this {name}: {' and '.join(parts)}; build the original model with the same options."
        )


def _fill(
    pruned: nn.Module, state: Mapping[str, Tensor], aliases: Mapping[str, str], path: str | os.PathLike[str]
) -> None:
    """Give the model the file's ties, dtypes and values."""
    own = dict(_tensors(pruned))
    for name, first in aliases.items():
        if name in own and first in own and _place(own[name]) != _place(own[first]):
            _retie(pruned, name, own[first])
    own = dict(_tensors(pruned))
    for names in _shared_names({name: own[name] for name in own if name in state}):
        stored = {aliases.get(name, name) for name in names}
        if len(stored) > 1:
            a, b = sorted(stored)[:2]
            raise CheckpointError(
                f"{path}: {a} and {b} are one tied tensor in the model given and two in the file; build the original "
                "model with the same options."
            )
    for name, value in own.items():
        if name in state and value.dtype != state[name].dtype:
            # The data are replaced inside the tensor, so that other references to the tensor see the new type, too.
            value.data = value.data.to(state[name].dtype)
    ready = OrderedDict(state)
    # The module versions that the class itself writes; without them some layers read a state dict as an old release's.
    ready._metadata = pruned.state_dict()._metadata  # type: ignore[attr-defined]
    try:
        pruned.load_state_dict(ready, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the model given can't be filled: {' '.join(str(error).split())}") from error
    for name, value in pruned.state_dict().items():
        if not torch.equal(bits(value), bits(state[name])):
            raise CheckpointError(f"{path}: {name} isn't what the file holds after the model's own loading hooks ran.")


def _retie(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    registry = owner._parameters if leaf in owner._parameters else owner._buffers
    registry[leaf] = tensor  # type: ignore[assignment]
