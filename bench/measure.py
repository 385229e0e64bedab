"""Measure one network with one tool, in a process of its own.

``python -m bench.measure TOOL NAME`` prints one line of JSON. Seconds are of processor time: on one thread the same as
the clock's on an idle machine, and the same on a busy one.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import math
import re
import resource
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.models import Entry, entries, output_layers
from tests import oracle

RATIO = 0.5
DOUBLE_LIMIT = 70_000_000
"""Networks of more parameters are compared in fp32, with a tolerance of 1e-4, and in fp64 where that is too strict."""
RECOVER_LIMIT = 150_000_000
"""Networks of more parameters are not searched for the channels that a pruner without a plan has kept."""


def distinct(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a network with random fp32 values, all of one tensor different, so that slices can be told by their values.

    Value k of a tensor is a power of two times ``±(1 + m / 2²³) · 2ᵉ``, with sign, m and e read off the bits of a
    random permutation of the element numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            n = parameter.numel()
            std = float(parameter.float().std()) if n > 1 and parameter.dim() > 1 else 0.5
            scale = 2.0 ** round(float(np.log2(min(max(std, 2**-8), 0.5))))
            code = torch.randperm(n, generator=generator)
            bits = 2 if n <= 2**26 else 3
            spread = torch.randint(0, max(1, 2**26 // max(n, 1)), (n,), generator=generator)
            code = code + n * spread if n <= 2**26 else code
            sign = 1 - 2 * (code & 1).double()
            exponent = ((code >> 1) & (2**bits - 1)).double()
            value = sign * scale * torch.exp2(exponent - bits) * (1 + (code >> (1 + bits)).double() / 2**23)
            parameter.copy_(value.view(parameter.shape).to(parameter.dtype))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def scattered(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a network with random values, norms' too, quickly."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, float(parameter.flatten()[:10000].float().std().clamp(0.01, 0.5)))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def resident(field: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at its peak."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> int:
    """Start a new peak measurement, and return the memory in use, without what was freed and is kept for later."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def _forward_peak(model: nn.Module, inputs: Any) -> int:
    before = reset_peak()
    oracle.run(model, inputs)
    return resident("VmHWM") - before


def macs(model: nn.Module, inputs: Any) -> int:
    """Count the multiply-accumulates of one forward: convolutions and matrix products, half the FLOPs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # the counter's hooks fail on views of parameters that want a gradient
        parameter.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        oracle.run(model, inputs)
    for parameter in trained:
        parameter.requires_grad_(True)
    return int(counter.get_total_flops()) // 2


def _compare(model: nn.Module, small: nn.Module, plan: Any, inputs: Any) -> dict[str, Any]:
    if _count(model) > DOUBLE_LIMIT:
        verdict = oracle.judge(model, small, plan, oracle.fresh(inputs, 1))
        if verdict.kind == "wrong-channel" and verdict.error < 1e-4:
            verdict = oracle.Verdict("exact", verdict.detail, verdict.error)
        if verdict.kind != "wrong-channel":
            return {"verdict": verdict.kind, "error": verdict.error, "detail": verdict.detail, "precision": "fp32"}
    doubled = copy.deepcopy(model).double(), copy.deepcopy(small).double()
    fresh = oracle.fresh(oracle.doubled(inputs), 1)
    verdict = oracle.judge(*doubled, plan, fresh)
    if verdict.kind == "wrong-channel" and oracle.judge(*doubled, plan, fresh, norms=True).exact:
        verdict = oracle.Verdict("inexact", "equals the original with norms over the kept channels", verdict.error)
    elif verdict.kind == "wrong-channel" and oracle.ties(*doubled, plan, fresh):
        verdict = oracle.Verdict("exact", "outputs tie, and rounding decides; all that layers make is equal")
    return {"verdict": verdict.kind, "error": verdict.error, "detail": verdict.detail, "precision": "fp64"}


def _prepare(entry: Entry, fill: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, Any, dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    model = fill(entry.build()).eval()
    inputs = entry.inputs(model)
    oracle.run(model, inputs)
    start = time.process_time()
    oracle.run(model, inputs)
    seconds = time.process_time() - start
    shapes = [list(t.shape) for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    return model, inputs, {
        "inputs": shapes,
        "parameters": _count(model),
        "bytes": sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]),
        "forward_seconds": seconds,
        "forward_peak_bytes": _forward_peak(model, inputs),
        "macs": macs(model, inputs),
    }  # fmt: skip


def half(group: Any, rng: np.random.Generator) -> list[int]:
    """Choose at random as many channels of a group as its constraint allows, half at most."""
    from secateur.graph.steps import steps

    order = steps(group, rng.permutation(group.size).tolist())
    taken = np.cumsum([len(step) for step in order]) <= RATIO * group.size
    return sorted(channel for step, wanted in zip(order, taken, strict=True) if wanted for channel in step)


def _tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    )


def _times(prune: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """Run nine times and for half a second; return processor time (the median), memory and result of the first.

    Three runs have to do from half a second on, and one from 3 s on. On a busy machine the clock of processor time may
    step by 4 ms: what takes less than 50 ms is timed as many times in a row as take that long.
    """
    taken: list[float] = []
    before = reset_peak()
    start = time.process_time()
    result = prune()
    first = time.process_time() - start
    peak = resident("VmHWM") - before
    together = max(1, math.ceil(0.05 / first))
    taken.append(first)
    while len(taken) < (1 if first >= 3 else 3 if first >= 0.5 else 9) or together * sum(taken) < 0.5:
        start = time.process_time()
        for _ in range(together):
            prune()
        taken.append((time.process_time() - start) / together)
    return {"seconds": statistics.median(taken), "peak_bytes": peak}, result


def _pruned(model: nn.Module, inputs: Any) -> tuple[Any, dict[str, list[int]], Any, nn.Module]:
    """Trace a network, and take half of the channels of each group that can be pruned exactly."""
    import secateur as sc

    rng = np.random.default_rng(0)
    graph = sc.trace(model, inputs)
    chosen = {g.name: channels for g in graph.groups if (channels := half(g, rng))}
    exact = {g.name for g in graph.groups if g.exact}
    plan = sc.plan_removal(graph, {n: c for n, c in chosen.items() if n in exact})
    return graph, chosen, plan, sc.apply(model, plan)


Stage = Callable[[dict[str, Any]], None]
"""Called with the row so far when a part of a measurement is done."""


def secateur(entry: Entry, stage: Stage) -> dict[str, Any]:
    """Trace, plan, apply and compare with Secateur: first the exact groups, then all."""
    import secateur as sc
    from secateur.pruning.readings import masked

    model, inputs, row = _prepare(entry, scattered)
    stage(row)
    _pruned(_tiny(), torch.zeros(1, 3, 8, 8))  # everything is imported and has run before the clock starts
    times, (graph, chosen, plan, small) = _times(lambda: _pruned(model, inputs))
    row |= times
    # What a detector finds, and so how much a forward takes, is another matter in the two networks that are compared.
    with masked(model, plan, defaultdict(list)):
        of_masked = _forward_peak(model, inputs)
    row["forward_peak_bytes"] = max(row["forward_peak_bytes"], of_masked, _forward_peak(small, inputs))
    stage(row)
    row |= {
        "groups": len(graph.groups),
        "channels": sum(g.size for g in graph.groups),
        "refusals": [
            {"operator": r.operator, "module": r.module, "source": r.source, "reason": r.reason,
             "tensors": len(r.tensors)}
            for r in graph.refused
        ],
    }  # fmt: skip
    row["macs_removed"] = _removed(entry, row["macs"], inputs, graph, plan, small)
    row["parameters_removed"] = 1 - _count(small) / max(row["parameters"], 1)
    row |= _compare(model, small, plan, inputs)
    if row["parameters_removed"] <= 0 and row["verdict"] == "exact":
        row |= {"verdict": "refused", "detail": "nothing could be pruned exactly"}
    row["macs_removed_all"] = row["macs_removed"]
    if not all(g.exact for g in graph.groups):
        del small
        try:
            every = sc.plan_removal(graph, chosen)
            small = sc.apply(model, every)
            row["macs_removed_all"] = _removed(entry, row["macs"], inputs, graph, every, small)
            shapes = [getattr(t, "shape", t) for t in oracle.run(small, inputs)]
            row["inexact"] = (
                "runs" if shapes == [getattr(t, "shape", t) for t in oracle.run(model, inputs)] else "shape"
            )
        except Exception as error:  # noqa: BLE001 - recorded as the result
            row["inexact"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def _removed(entry: Entry, whole: int, inputs: Any, graph: Any, plan: Any, small: nn.Module) -> float:
    """Return the fraction of the MACs that a plan removes."""
    import secateur as sc

    if "/detection/" not in entry.name and (removed := 1 - macs(small, inputs) / max(whole, 1)) >= 0:
        return removed
    # Other values, other detections: count both networks at as many as the original finds.
    return 1 - sc.macs(graph, plan) / max(sc.macs(graph), 1)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _refused_layers(model: nn.Module, inputs: Any) -> list[str]:
    """Name the layers all of whose outputs Secateur leaves alone: the peer has to be told which to ignore."""
    import secateur as sc

    graph = sc.trace(model, inputs)
    made = {member.module for group in graph.groups for member in group.producers}
    refused = {name.rpartition(".")[0] for refusal in graph.refused for name in refusal.tensors}
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return [name for name, m in model.named_modules() if name in refused - made and isinstance(m, kinds)]


def _outputs(entry: Entry, model: nn.Module, inputs: Any) -> list[str]:
    """Name the layers that the peer is told to ignore: those that make a network's outputs, or that Secateur leaves."""
    own = entry.name.startswith(("torchvision", "timm"))
    return output_layers(model) if own else _refused_layers(model, inputs)


def peer(entry: Entry, stage: Stage) -> dict[str, Any]:
    """Prune and compare with Torch-Pruning."""
    import torch_pruning  # noqa: F401 - imported before the clock starts

    from bench import peer as tool

    model, inputs, row = _prepare(entry, lambda m: distinct(m) if _count(m) <= RECOVER_LIMIT else scattered(m))
    outputs = _outputs(entry, model, inputs)
    tiny = _tiny()
    tool.prune(tiny, torch.zeros(1, 3, 8, 8), ["4"], RATIO)
    stage(row)
    copied: list[float] = []

    def pruned() -> nn.Module:
        """Copy first: it prunes in place, and Secateur leaves the network as it is."""
        start = time.process_time()
        whole = copy.deepcopy(model)
        copied.append(time.process_time() - start)
        return tool.prune(whole, inputs, outputs, RATIO)

    times, small = _times(pruned)
    row |= {**times, "copy_seconds": statistics.median(copied), "ignored": outputs}
    try:
        row["macs_removed"] = 1 - macs(small, inputs) / max(row["macs"], 1)
    except Exception as error:  # noqa: BLE001 - recorded as the result
        return row | {"verdict": "crash", "detail": f"{type(error).__name__}: {str(error)[:200]}"}
    if row["macs_removed"] <= 0:
        return row | {"verdict": "refused", "detail": "nothing was pruned"}
    stage(row)
    if row["parameters"] > RECOVER_LIMIT:
        return row | {"verdict": "runs", "detail": "too large to tell which channels are left"}
    try:
        plan = oracle.recover(model, small)
    except ValueError as error:
        return row | {"verdict": "runs", "detail": str(error)}
    return row | _compare(model, small, plan, inputs)


def paired(entry: Entry, stage: Stage) -> dict[str, Any]:
    """Time both tools in turn, in one process: what the machine does meanwhile, it does to both.

    What one has left behind is collected before the other starts. Medians of seven rounds, or of three where one takes
    over 3 s.
    """
    import torch_pruning  # noqa: F401 - imported before the clock starts

    from bench import peer as tool

    model, inputs, _ = _prepare(entry, scattered)
    outputs = _outputs(entry, model, inputs)

    def cut() -> None:
        tool.prune(copy.deepcopy(model), inputs, outputs, RATIO)

    taken: dict[str, list[float]] = {"secateur": [], "peer": []}
    together = dict.fromkeys(taken, 1)
    rounds = 8
    while len(taken["peer"]) < rounds:
        for name, prune in (("secateur", lambda: _pruned(model, inputs)), ("peer", cut)):
            gc.collect()
            start = time.process_time()
            for _ in range(together[name]):
                prune()
            taken[name].append((time.process_time() - start) / together[name])
            together[name] = max(1, math.ceil(0.05 / taken[name][-1]))
        if taken["secateur"][0] + taken["peer"][0] > 3:
            rounds = 4
    # The first round has imported what the others use.
    return {"verdict": "paired", **{name: statistics.median(seconds[1:]) for name, seconds in taken.items()}}


def main() -> None:
    """Measure, and print one line of JSON."""
    tool, name = sys.argv[1:3]
    entry = next(e for e in entries() if e.name == name)
    try:
        row = (secateur if tool == "secateur" else peer)(entry, lambda _: None)
    except Exception as error:
        row = {"verdict": "crash", "detail": f"{type(error).__name__}: {str(error)[:300]}"}
        if "--raise" in sys.argv:
            raise
    print(json.dumps(row))


if __name__ == "__main__":
    main()
