"""Run directories that follow the engine's contract, with numbers from a formula, for testing what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from secateur.runfile import trials

TIMED = {
    "batch": 8, "runtime": "onnxruntime", "threads": 1, "predicted": 0.62, "measured": 0.66, "error": -0.06,
    "before": 0.0042, "after": 0.002772, "slower": False, "corrected_from": None,
}  # fmt: skip
"""What a target of latency writes into a result, but for what was asked."""


def write_run(
    folder: Path,
    widths: dict[str, tuple[int, int, int]] | None = None,
    rounds: int = 8,
    seed: int = 0,
    benchmark: bool = True,
    method: str = "cfp",
    lost: float = 0.004,
    latency: float | None = None,
    damage: bool = True,
) -> Path:
    """Write a finished run of a plain CNN: module -> (inputs, filters before, output positions).

    ``latency`` is a target of that fraction in place of a tolerance; ``damage`` writes a table of sensitivity.
    """
    widths = widths or {"conv1": (1, 20, 576), "conv2": (20, 50, 64), "conv3": (50, 64, 16)}
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    keep = {module: max(2, round(filters * 0.55)) for module, (_, filters, _) in widths.items()}
    before = _state(widths, {module: filters for module, (_, filters, _) in widths.items()}, 0.9917, 0.9921)
    after = _state(widths, keep, 0.9917 - lost, 0.9921 - lost)
    weights = {}
    for module, (inputs, filters, _) in widths.items():
        weight = torch.randn(filters, inputs, 3, 3, generator=generator)
        weight[1] = 0.9 * weight[0] + 0.1 * weight[1]
        weights[f"{module}.weight"] = weight
    save_file(weights, folder / "baseline.safetensors")
    save_file(
        {name: w[1 : keep[name.removesuffix(".weight")] + 1].clone() for name, w in weights.items()},
        folder / "model.safetensors",
    )
    rho = {module: 0.62 + 0.3 * math.sin(i) ** 2 for i, module in enumerate(widths)}
    lines = []
    for i in range(rounds):
        share = 1 - (i + 1) / rounds * (1 - after["macs"] / before["macs"])
        accepted = i % 4 != 3
        tuned = 0.9917 - lost * (i + 1) / rounds - (0 if accepted else 0.012)
        lines.append(
            {
                "round": i + 1,
                "phase": 1 if i < rounds / 2 else 2,
                "group": None if i < rounds / 2 else list(widths)[i % len(widths)],
                "removed": {module: [i] for module in widths},
                "pairs": [],
                "abs_rho_before": {m: r - 0.05 * i for m, r in rho.items()},
                "abs_rho_after": dict.fromkeys(rho, 0.993),
                "metric_before": 0.9917,
                "metric_dropped": tuned - 0.02,
                "metric_tuned": tuned,
                "macs": round(share * before["macs"]),
                "parameters": round(share * before["parameters"]),
                "widths": keep,
                "accepted": accepted,
                "seconds": 12.5,
            }
        )
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _dump(
        folder / "result.json",
        {
            "metric": "accuracy",
            "baseline": before,
            "final": after,
            "refused": [
                {
                    "operator": "aten.sort.default",
                    "module": "head.<rank>",
                    "source": "model.py:41",
                    "reason": "sorting reorders channels & mixes them",
                }
            ],
            "verification": {"exact": True, "max_error": 3.1e-13},
            "max_abs_rho": {"before": rho, "after": {m: 0.35 * r for m, r in rho.items()}},
            "latency": latency and {**TIMED, "asked": 1 - latency},
        },
    )
    _dump(
        folder / "config.json",
        {
            "model": "plain CNN",
            "method": method,
            "data": "formula",
            "seed": seed,
            "tolerance": 0.5,
            "target": latency and {"latency": latency, "batch": 8},
            "versions": {"torch": "2.14.1"},
            "machine": {"cpu": "2 cores"},
        },
    )
    if damage:
        sizes = {module: filters for module, (_, filters, _) in widths.items()}
        losses = {
            module: {str(max(1, size * k // 8)): 0.001 * (place + 1) * 4.0**k for k in range(1, 8)}
            for place, (module, size) in enumerate(sizes.items())
        }
        of = {"sizes": sizes, "damage": losses, "measure": "kl", "images": 512, "network": 1, "made_with": ""}
        _dump(folder / "sensitivity.json", {"format_version": 1, **of})
    if benchmark:
        _dump(folder / "benchmark.json", {"rows": _measurements(before["parameters"]), "environment": {}})
    return folder


def _state(
    layers: dict[str, tuple[int, int, int]], widths: dict[str, int], validation: float, test: float
) -> dict[str, Any]:
    rows, previous = [], None
    for module, (inputs, _, positions) in layers.items():
        reads = inputs if previous is None else widths[previous]
        parameters = 9 * reads * widths[module]
        rows.append(
            {
                "module": module,
                "macs": parameters * positions,
                "parameters": parameters,
                "out_channels": widths[module],
                "positions": positions,
            }
        )
        previous = module
    total = sum(row["parameters"] for row in rows)
    return {
        "validation": validation,
        "test": test,
        "macs": sum(row["macs"] for row in rows),
        "parameters": total,
        "file_bytes": 4 * total + 2048,
        "latency_ms": total / 8000,
        "widths": widths,
        "layers": rows,
    }


def _measurements(parameters: int) -> list[dict[str, Any]]:
    rows = []
    for backend, cost in (("eager", 1.0), ("onnxruntime", 0.6)):
        for variant, factor in (("original", 1.0), ("pruned", 0.55)):
            for size in (1, 2, 4, 8, 16, 32):
                seconds = cost * factor * (0.0006 + 0.0004 * size)
                rows.append(
                    {
                        "variant": variant,
                        "backend": backend,
                        "device": "cpu",
                        "threads": 1,
                        "batch_size": size,
                        "seconds": seconds,
                        "iqr": 0.04 * seconds,
                        "weight_bytes": 4 * parameters,
                        "peak_bytes": round(factor * 52000 * size + 1e5) if backend == "eager" else None,
                    }
                )
    return rows


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))


def write_sweep(folder: Path, count: int = 4) -> Path:
    """Write a sweep with the runs of its complete trials; the last of them is somewhere else."""
    folder.mkdir(parents=True)
    (folder / trials.SWEEP_FILE).write_text("model: lenet5\ndata: digits\nsearch: {space: {settings.lr: [0.1, 0.2]}}\n")
    found = []
    for number in range(count):
        if number < count - 1:
            write_run(folder / trials.run_name(number), seed=number, lost=0.003 * (number + 1))
        found.append(
            trials.Trial(
                number=number, state="complete", parameters={"settings.lr": 0.1 * (number + 1)}, attempts=1,
                values=[0.9, 1e6],
            )
        )  # fmt: skip
    trials.write(
        trials.Trials(study="rates", storage="", objectives=["accuracy", "macs"], total=count, trials=found), folder
    )
    return folder
