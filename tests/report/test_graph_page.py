"""The drawn channel graph says what the graph holds: every group, every member, every refusal, each in its place."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.models import lenet5
from secateur.report import draw_graph
from tests.cases import CASES

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["lenet5", "dense", *list(CASES)[::18]]
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[::3] if name not in NAMES]


class Dense(nn.Module):
    """A dense block: every layer reads the outputs of all before it."""

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(layers))
        self.head = nn.Linear(8 + 4 * layers, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.head(x.mean((2, 3)))


@functools.cache
def graph_of(name: str) -> sc.ChannelGraph:
    torch.manual_seed(0)
    if name == "lenet5":
        return sc.trace(lenet5(), torch.randn(1, 1, 28, 28))
    if name == "dense":
        return sc.trace(Dense().eval(), torch.randn(1, 3, 8, 8))
    case = CASES[name]
    return sc.trace(case.build().eval(), case.inputs())


@dataclass
class Shown:
    """What a page shows, read from its markup."""

    store: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    labels: list[str] = field(default_factory=list)
    strands: list[dict[str, Any]] = field(default_factory=list)
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    cells: list[list[str]] = field(default_factory=list)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.shown = Shown()
        self.inside = ""
        self.label = self.cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        shown = self.shown
        shown.elements.append((tag, found))
        kind = found.get("class") or ""
        if tag == "script":
            self.inside = found.get("id") or "script"
        elif tag in ("style", "nav"):
            self.inside = tag
        elif tag == "button" and "data-row" in found:
            self.label = True
            shown.labels.append("")
        elif tag == "g" and kind.startswith("strand"):
            shown.strands.append({"group": int(found["data-group"] or -1), "p": [], "c": [], "f": []})
        elif tag == "tr":
            shown.cells.append([])
        elif tag in ("td", "th") and shown.cells:
            shown.cells[-1].append("")
            self.cell = True
        elif shown.strands and kind in ("p", "c"):
            shown.strands[-1][kind].append((float(found["cx"] or 0), float(found["cy"] or 0)))
        elif shown.strands and kind == "f":
            x, y = re.fullmatch(r"M(\S+) (\S+)h8", found["d"] or "").groups()  # type: ignore[union-attr]
            shown.strands[-1]["f"].append((float(x) + 4, float(y)))
        elif shown.strands and kind.startswith("line"):
            path = re.fullmatch(r"M(\S+) (\S+)V(\S+)", found["d"] or "")
            shown.strands[-1].update(line=[float(n) for n in path.groups()], dashed="dashed" in kind)  # type: ignore[union-attr]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "nav"):
            self.inside = ""
        if tag == "button":
            self.label = False
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data: str) -> None:
        if self.inside == "graph":
            self.shown.store = json.loads(data)
        elif not self.inside:
            self.shown.text += data
            if self.label:
                self.shown.labels[-1] += data
            if self.cell:
                self.shown.cells[-1][-1] += data


def read(page: str) -> Shown:
    reader = Reader()
    reader.feed(page)
    return reader.shown


@functools.cache
def shown_of(name: str) -> Shown:
    return read(draw_graph(graph_of(name), name))


@pytest.mark.parametrize("name", NAMES + MORE)
def test_every_group_and_every_member_is_told(name: str) -> None:
    graph, shown = graph_of(name), shown_of(name)
    assert len(shown.store["groups"]) == len(shown.strands) == len(graph.groups)
    table = {row[0]: row for row in shown.cells}
    for group, told in zip(graph.groups, shown.store["groups"], strict=True):
        assert (told["name"], told["size"], told["constraint"]) == (group.name, group.size, group.constraint)
        assert told["removable"] == int(group.removable.sum())
        assert told["macs"] == pytest.approx(graph.share_of_macs(group), abs=1e-5)
        assert bool(told["inexact"]) != group.exact
        assert group.reason in told["inexact"]
        assert table[group.name][1:3] == [f"{group.size:,}", f"{told['removable']:,}"]
        members = {
            (role, ".".join(filter(None, (shown.store["names"][owner], tensor))), count)
            for role, _, _, owners in told["marks"]
            for owner, tensors, count in owners
            for tensor in tensors.split(" ")
        }
        assert members == {(m.role.value[0], m.tensor, len({*m.channels.tolist()})) for m in group.members}


@pytest.mark.parametrize("name", NAMES + MORE)
def test_marks_lie_on_the_rows_of_their_layers(name: str) -> None:
    graph, shown = graph_of(name), shown_of(name)
    height = shown.store["row"]
    modules = [row[0] for row in shown.store["rows"]]
    assert shown.labels == [module or "the model" for module in modules]
    owned = {port.weight: port.module for port in graph.layers if port.owned}
    calls = list(dict.fromkeys(port.module for port in graph.layers if port.owned))
    assert [module for module in modules if module in calls] == calls
    for group, told, drawn in zip(graph.groups, shown.store["groups"], shown.strands, strict=True):
        rows: dict[str, set[float]] = {"p": set(), "c": set()}
        for role, row, between, owners in told["marks"]:
            if role != "f":
                assert not between
                rows[role].add((row + 0.5) * height)
            for owner, tensors, _ in owners:
                for tensor in tensors.split(" "):
                    module = owned.get(".".join(filter(None, (shown.store["names"][owner], tensor))))
                    assert module is None or (modules[row], between) == (module, 0)
        x, top, bottom = drawn["line"]
        assert {y for _, y in drawn["p"]} == rows["p"]
        assert {y for _, y in drawn["c"]} == rows["c"]
        places = [*drawn["p"], *drawn["c"], *drawn["f"]]
        assert all(place[0] == x and top <= place[1] <= bottom for place in places)
        assert drawn["dashed"] == (not group.exact)


@pytest.mark.parametrize("name", NAMES + MORE)
def test_strands_of_one_lane_do_not_overlap(name: str) -> None:
    lines = sorted(strand["line"] for strand in shown_of(name).strands)
    for (x, _, bottom), (other, top, _) in pairwise(lines):
        assert x != other or bottom < top


@pytest.mark.parametrize("name", NAMES + MORE)
def test_every_refusal_is_told_with_its_reason_and_line(name: str) -> None:
    graph, shown = graph_of(name), shown_of(name)
    table = [row for row in shown.cells if len(row) == 5]
    for refusal in graph.refused:
        row = [", ".join(refusal.tensors) or "–", refusal.operator, refusal.module or "the model"]
        assert [*row, refusal.source or "–", refusal.reason] in table
        for port in graph.layers:
            if port.owned and port.weight in refusal.tensors:
                (stays,) = [text for module, _, text in shown.store["rows"] if module == port.module]
                assert refusal.operator in stays
                assert refusal.reason in stays
                assert refusal.source in stays
                assert stays in shown.text
    for note in graph.notes:
        assert note in shown.text


def test_a_chain_needs_two_lanes_and_a_dense_block_one_for_each_layer() -> None:
    assert len({strand["line"][0] for strand in shown_of("lenet5").strands}) == 2
    # The stem and all twelve layers are read by the last one.
    assert len({strand["line"][0] for strand in shown_of("dense").strands}) == 13


def test_neighbours_have_different_colours() -> None:
    colours = re.findall(r'class="strand (c\d)"', draw_graph(graph_of("dense")))
    assert all(a != b for a, b in pairwise(colours))


def test_the_page_is_self_contained_and_what_a_network_names_is_never_markup() -> None:
    model = nn.Sequential()
    model.add_module("</script><img src=x>", nn.Conv2d(3, 4, 1))
    model.add_module("a & b", nn.Conv2d(4, 2, 1))
    page = draw_graph(sc.trace(model.eval(), torch.randn(1, 3, 4, 4)), "<b onload=1>")
    shown = read(page)
    assert "default-src 'none'" in page
    assert shown.labels == ["</script><img src=x>", "a & b"]
    assert "<b onload=1>" in shown.text
    for tag, attributes in shown.elements:
        assert tag not in {"img", "b", "iframe", "object", "embed", "base"}
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    ids = [a["id"] for _, a in shown.elements if a.get("id")]
    assert len(ids) == len(set(ids))


def test_a_network_without_groups_is_drawn_too() -> None:
    shown = read(draw_graph(sc.trace(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4))))
    assert shown.labels == ["the model"]
    assert shown.strands == []
    assert "No channel of the 1 layers can be removed" in shown.text
    assert "model output" in shown.text
