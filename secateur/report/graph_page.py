"""The coupling of a network's channels as one HTML page that holds everything it shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.graph import cost
from secateur.graph.channels import MACS_OF_A_GROUP, Role
from secateur.report import html
from secateur.report.coupling import Coupling, Mark, Row, Strand, height, lay_out
from secateur.report.figures import Cell, Table, percent, quantity

if TYPE_CHECKING:
    from collections.abc import Iterable

    from secateur.graph.channels import MACS_OF_A_GROUP, ChannelGraph, ChannelGroup, Member

ROW = 20
"""Pixels from one row to the next; the style sheet has the same number."""
COLOURS = 6
"""Colours of the style sheet, which strands take in turns."""


@dataclass(frozen=True)
class _Drawn:
    """A strand in pixels."""

    group: int
    colour: int
    width: float
    dashed: bool
    x: float
    top: float
    bottom: float
    producers: list[float]
    consumers: list[float]
    followers: list[float]


def draw_graph(graph: ChannelGraph, title: str = "") -> str:
    """Draw which channels go together: a row a layer, a strand a group, a mark where the group's channels are.

    Args:
        graph: The traced network.
        title: Name of the network.

    Returns:
        HTML with its style, script and data inside; it asks nothing of a network. Without scripts, it shows the figure
        and the tables.
    """
    coupling = lay_out(graph)
    pitch = 16 if coupling.lanes <= 12 else 12 if coupling.lanes <= 30 else 10
    strands = [
        _drawn(graph.groups[s.group], s, colour, pitch)
        for s, colour in zip(coupling.strands, _colours(coupling), strict=True)
    ]
    shares = [graph.share_of_macs(group) for group in graph.groups]
    return html.page(
        "graph.html.j2",
        title=title or "Channel graph",
        lead=_lead(graph, coupling),
        badges=_badges(graph),
        rows=coupling.rows,
        facts=[_facts(graph, row) for row in coupling.rows],
        most=max((row.macs for row in coupling.rows), default=0) or 1,
        groups=list(zip(graph.groups, shares, strands, strict=True)),
        percent=percent,
        width=coupling.lanes * pitch + 8,
        height=max(len(coupling.rows), 1) * ROW,
        guides=_guides(coupling, strands),
        table=_group_table(graph, shares),
        refused=_refused_table(graph),
        notes=graph.notes,
        css=html.asset("page.css", "graph.css"),
        js=html.asset("frame.js", "graph.js"),
        data=html.script_json(_data(graph, coupling, shares)),
    )


def _colours(coupling: Coupling) -> list[int]:
    """Choose for every strand a colour that the one above it and those beside it do not have."""
    chosen: list[int] = []
    latest: dict[int, int] = {}
    for strand in coupling.strands:
        near = {latest.get(strand.lane + aside) for aside in (-1, 0, 1)}
        colours = [(strand.group + i) % COLOURS for i in range(COLOURS)]
        latest[strand.lane] = next(colour for colour in colours if colour not in near)
        chosen.append(latest[strand.lane])
    return chosen


def _drawn(group: ChannelGroup, strand: Strand, colour: int, pitch: int) -> _Drawn:
    heights: dict[Role, list[float]] = {role: [] for role in Role}
    made = {mark.row for mark in strand.marks if mark.role is Role.PRODUCER}
    for mark in strand.marks:
        # The bias of a layer whose weight makes the channels has no mark of its own.
        if mark.role is not Role.FOLLOWER or mark.between or mark.row not in made:
            heights[mark.role].append(height(mark) * ROW)
    return _Drawn(
        group=strand.group,
        colour=colour,
        width=round(min(1.4 + 0.4 * math.log2(max(group.size, 8) / 8), 4.0), 1),
        dashed=not group.exact,
        x=(strand.lane + 0.5) * pitch + 4,
        top=strand.top * ROW,
        bottom=strand.bottom * ROW,
        producers=heights[Role.PRODUCER],
        consumers=heights[Role.CONSUMER],
        followers=heights[Role.FOLLOWER],
    )


def _guides(coupling: Coupling, strands: list[_Drawn]) -> str:
    """Return the path of the lines that lead from each row's name to its last mark."""
    ends: dict[int, float] = {}
    for strand, drawn in zip(coupling.strands, strands, strict=True):
        for mark in strand.marks:
            if not mark.between:
                ends[mark.row] = max(ends.get(mark.row, 0), drawn.x)
    return "".join(f"M0 {(row + 0.5) * ROW:g}H{x:g}" for row, x in sorted(ends.items()))


def _lead(graph: ChannelGraph, coupling: Coupling) -> str:
    channels = sum(group.size for group in graph.groups)
    prunable = sum(int(group.removable.sum()) for group in graph.groups)
    layers = len(coupling.rows)
    free = "all of which can be removed" if prunable == channels else f"{prunable:,} of which can be removed"
    groups = f"{len(graph.groups)} group{'s' * (len(graph.groups) != 1)}"
    return (
        f"{groups} of coupled channels in {layers} layers: {channels:,} channels, {free}. Each strand is a group: "
        "a channel goes from every layer that its strand marks, or from none."
        if graph.groups
        else f"No channel of the {layers} layers can be removed; the reasons are below."
    )


def _badges(graph: ChannelGraph) -> list[str]:
    inexact = sum(not group.exact for group in graph.groups)
    ruled = sum(bool(group.constraint) for group in graph.groups)
    found = [f"{quantity(cost.macs(graph))} MACs", f"{quantity(cost.parameters(graph))} parameters"]
    found += [f"{ruled} with a constraint"] if ruled else []
    found += [f"{inexact} inexact"] if inexact else []
    found.append(f"{len(graph.refused)} reason{'s' * (len(graph.refused) != 1)} why others stay")
    return found


@dataclass(frozen=True)
class _Facts:
    """What the page shows to the right of a row."""

    channels: str
    macs: float
    stays: str


def _facts(graph: ChannelGraph, row: Row) -> _Facts:
    channels = "" if row.in_channels is None else f"{row.in_channels} → {row.out_channels}"
    stays = "; ".join(dict.fromkeys(_because(graph, i) for i in row.refusals))
    return _Facts(channels, row.macs, stays)


def _because(graph: ChannelGraph, index: int) -> str:
    refusal = graph.refused[index]
    place = f" at {refusal.source}" if refusal.source else ""
    return f"{refusal.operator}{place}: {refusal.reason}"


def _group_table(graph: ChannelGraph, shares: list[float]) -> Table:
    columns = ["Group", "Channels", "Removable", "MACs", "Constraint", "Exact", "Made by", "Read by"]
    rows: list[list[Cell]] = [
        [
            group.name,
            group.size,
            int(group.removable.sum()),
            share,
            group.constraint or "–",
            "yes" if group.exact else f"no: {group.reason}",
            _some(group.producers),
            _some(group.consumers),
        ]
        for group, share in zip(graph.groups, shares, strict=True)
    ]
    caption = f"The groups; MACs: {MACS_OF_A_GROUP}"
    return Table(columns, rows, caption, {"MACs": "percent"})


def _refused_table(graph: ChannelGraph) -> Table:
    rows: list[list[Cell]] = [
        [", ".join(r.tensors) or "–", r.operator, r.module or "the model", r.source or "–", r.reason]
        for r in graph.refused
    ]
    return Table(["Fixed", "Operator", "In module", "Source line", "Reason"], rows, "What stays, and why")


def _some(members: Iterable[Member], most: int = 3) -> str:
    names = list(dict.fromkeys(m.module or m.tensor for m in members))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "–"


def _data(graph: ChannelGraph, coupling: Coupling, shares: list[float]) -> dict[str, Any]:
    """Return the script's data on each group: every member, each module's name written once."""
    names: dict[str, int] = {}

    def numbered(name: str) -> int:
        return names.setdefault(name, len(names))

    def told(mark: Mark) -> list[Any]:
        owned: dict[tuple[str, int], list[str]] = {}
        for member in mark.members:
            key = (member.module, int(np.unique(member.channels).size))
            owned.setdefault(key, []).append(member.tensor.removeprefix(f"{member.module}."))
        owners = [[numbered(module), " ".join(tensors), count] for (module, count), tensors in owned.items()]
        return [mark.role.value[0], mark.row, int(mark.between), owners]

    groups = []
    for strand, share in zip(coupling.strands, shares, strict=True):
        group = graph.groups[strand.group]
        groups.append(
            {
                "name": group.name,
                "size": group.size,
                "removable": int(group.removable.sum()),
                "macs": round(share, 5),
                "constraint": group.constraint,
                "inexact": "" if group.exact else group.reason or "removal can't equal zeroing",
                "marks": [told(mark) for mark in strand.marks],
            }
        )
    rows = [[row.module, row.kind, _facts(graph, row).stays] for row in coupling.rows]
    return {"groups": groups, "rows": rows, "names": list(names), "row": ROW}
