"""Correlation among the filters of a layer, from the weights a run has saved."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import DataError
from secateur.report.figures import HeatMap

CELLS = 96
"""Cells a side of a heat map: more can't be told apart on a page, and every one costs bytes."""


def heat_maps(
    before: str | Path, after: str | Path | None = None, layers: list[str] | None = None, limit: int = 24
) -> list[HeatMap]:
    """Correlate the filters of every convolution in a file of weights.

    |ρ| is Pearson's, of filters flattened to vectors (Singh et al. 2020, eq. 7). Departures: the row of a constant
    filter, for which ρ is undefined, is 0.

    Args:
        before: safetensors file of the original network.
        after: safetensors file of the pruned network.
        layers: Module names to draw; default every convolution, in the file's order, up to ``limit``.
        limit: The most layers to draw when none are named; spread evenly over the depth.

    Returns:
        One heat map a layer.

    Raises:
        DataError: If a file is damaged or does not hold a layer that is asked for.
    """
    found = {name.removesuffix(".weight"): name for name, rank in _ranks(before).items() if rank >= 3}
    found = {module: name for module, name in found.items() if module + ".weight" == name}
    chosen = list(found)
    if layers is not None:
        missing = [module for module in layers if module not in found]
        if missing:
            raise DataError(f"{before}: no convolution {missing[0]!r}. It has {', '.join(found) or 'none'}.")
        chosen = layers
    elif len(chosen) > limit:
        chosen = [chosen[round(i * (len(chosen) - 1) / (limit - 1))] for i in range(limit)]
    later = set(_ranks(after)) if after is not None else set()
    maps = []
    for module in chosen:
        weight = _tensor(before, found[module])
        if weight.shape[0] < 2 or weight[0].numel() < 2:
            continue
        pruned = _tensor(after, found[module]) if after is not None and found[module] in later else None
        maps.append(_heat_map(module, weight, pruned))
    return maps


def absolute_correlation(weight: Tensor) -> Tensor:
    """|ρ| of every pair of filters, shape ``(C_out, C_out)``, 1 on the diagonal, 0 where a filter is constant."""
    rho = torch.corrcoef(weight.flatten(1).double()).reshape(weight.shape[0], -1).abs()
    return rho.nan_to_num(0.0).clamp(0, 1).fill_diagonal_(1.0)


def _heat_map(module: str, before: Tensor, after: Tensor | None) -> HeatMap:
    first = absolute_correlation(before)
    second = absolute_correlation(after) if after is not None and after[0].numel() > 1 else None
    cell = math.ceil(first.shape[0] / CELLS)
    return HeatMap(
        module=module,
        before=_cells(first, cell),
        after=_cells(second, cell) if second is not None else None,
        filters_before=first.shape[0],
        filters_after=second.shape[0] if second is not None else None,
        max_before=_largest(first),
        max_after=_largest(second) if second is not None else None,
        cell=cell,
    )


def _largest(rho: Tensor) -> float:
    off_diagonal = rho.clone().fill_diagonal_(0.0)
    return float(off_diagonal.max())


def _cells(rho: Tensor, cell: int) -> list[list[float]]:
    """Largest |ρ| off the diagonal of each block of ``cell`` filters; the diagonal of single filters stays 1."""
    if cell > 1:
        side = math.ceil(rho.shape[0] / cell)
        padded = rho.new_zeros(side * cell, side * cell)
        padded[: rho.shape[0], : rho.shape[0]] = rho.clone().fill_diagonal_(0.0)
        rho = padded.reshape(side, cell, side, cell).amax(dim=(1, 3))
    return [[round(value, 2) for value in row] for row in rho.tolist()]


def _ranks(path: str | Path) -> dict[str, int]:
    """Rank of every tensor in the file, without reading any."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: len(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}).") from error


def _tensor(path: str | Path, name: str) -> Tensor:
    with safe_open(str(path), framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
