"""Traces in several threads: what other threads run is no part of a trace, and traces wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph.channels import ChannelGraph
from secateur.tracing.assumptions import Assumptions
from secateur.tracing.recording import record

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MEANWHILE: dict[str, Callable[[], object]] = {}
"""What networks of a name do in their forward: locks can't be copied with a network."""


class Net(nn.Module):
    """Two convolutions, with something that happens between them."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        MEANWHILE.get(self.name, bool)()
        return self.last(x)


def groups(graph: ChannelGraph) -> list[object]:
    return [*((group.name, group.size, group.exact) for group in graph.groups), *(r.reason for r in graph.refused)]


def test_what_another_thread_runs_is_no_part_of_a_trace() -> None:
    entered, leave = threading.Event(), threading.Event()

    def in_the_middle(*_: object) -> None:
        entered.set()
        assert leave.wait(20)

    other = nn.Conv2d(3, 5, 3)
    other.register_forward_pre_hook(in_the_middle)  # a module with a hook looks for everybody's hooks twice
    thread = threading.Thread(target=lambda: other(X))
    thread.start()
    assert entered.wait(20)
    MEANWHILE["ends_the_other"] = lambda: (leave.set(), thread.join())
    # A trace would run the network once more, in another way, when this fails.
    recording = record(Net("ends_the_other"), X, Assumptions())
    assert [layer.module for layer in recording.found.layers] == ["first", "last"]


def test_a_trace_begins_when_another_has_ended() -> None:
    inside, found, together = threading.Event(), {}, []

    def wait_for_the_other() -> None:
        inside.set()
        if not together:
            together.append(second_runs.wait(0.3))

    second_runs = threading.Event()
    MEANWHILE.update(first=wait_for_the_other, second=second_runs.set)

    def trace(name: str) -> None:
        found[name] = groups(sc.trace(Net(name), X))

    first, second = (threading.Thread(target=trace, args=(name,)) for name in ("first", "second"))
    first.start()
    assert inside.wait(20)
    second.start()
    first.join(60)
    second.join(60)
    assert together == [False]
    assert second_runs.is_set()
    assert found == dict.fromkeys(("first", "second"), groups(sc.trace(Net(), X)))
