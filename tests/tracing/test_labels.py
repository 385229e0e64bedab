"""Labels and the classes that joins make of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.tracing import labels
from secateur.tracing.labels import LabelStore


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40), st.integers(1, 50))
def test_classes_are_the_connected_components_of_the_joins(
    count: int, pairs: list[tuple[int, int]], at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "_PAIRS", at_once)
        check_components(count, pairs)


def check_components(count: int, pairs: list[tuple[int, int]]) -> None:
    """Compare with components that are united one join after another."""
    store = LabelStore()
    store.fresh(count)
    pairs = [(a % count, b % count) for a, b in pairs]
    parent = list(range(count))
    for a, b in pairs:
        store.join(np.array([a]), np.array([b]))
        old, new = parent[a], parent[b]
        parent = [new if p == old else p for p in parent]
    classes = store.classes().tolist()
    assert len(set(zip(classes, parent, strict=True))) == len(set(classes)) == len(set(parent))
    assert list(dict.fromkeys(classes)) == list(range(len(set(classes)))), "numbered as they come"


def test_arrays_are_joined_label_by_label_broadcasting() -> None:
    store = LabelStore()
    rows, columns = store.fresh(3)[:, None], store.fresh(6).reshape(3, 2)
    store.join(rows, columns)
    assert store.classes().tolist() == [0, 1, 2, 0, 0, 1, 1, 2, 2]


def test_of_labels_the_parameters_are_found_and_what_they_are_computed_from() -> None:
    store = LabelStore()
    a, b, c, d = (store.fresh_for(name, 0, 3) for name in "abcd")
    store.fresh(2)
    store.join(a[:2], b[1:], mixed=True)
    store.join(c, d)
    names = [
        [h.tensor for h in store.homes_of(v, mixed=mixed)] for v in ([a[:1]], [b[:1]], [c]) for mixed in (False, True)
    ]
    assert names == [["a"], ["a", "b"], ["b"], ["b"], ["c"], ["c"]]
    assert store.homes_of([np.array([12, 13])]) == store.homes_of([]) == LabelStore().homes_of([]) == []


def test_a_label_finds_the_parameter_it_was_made_for() -> None:
    store = LabelStore()
    store.fresh(3)
    weight = store.fresh_for("conv.weight", 0, 4)
    store.fresh(2)
    bias = store.fresh_for("conv.bias", 0, 4)
    assert [store.home(i) for i in (0, 2, 7, 8)] == [None] * 4
    assert {store.home(int(i)).tensor for i in weight} == {"conv.weight"}  # type: ignore[union-attr]
    assert {store.home(int(i)).tensor for i in bias} == {"conv.bias"}  # type: ignore[union-attr]


def test_a_vector_is_cut_apart_where_something_else_begins() -> None:
    store = LabelStore()
    a, b = store.fresh_for("a", 0, 12), store.fresh_for("b", 0, 4)
    assert store.are_apart(np.concatenate([a, b]), 12)
    assert store.are_apart(np.concatenate([a[4:], a[:4]]), 8)
    assert store.are_apart(np.concatenate([a[:6], a[:6]]), 6)
    assert store.are_apart(np.concatenate([a[:1], b]), 1)
    assert not any(store.are_apart(a, at) for at in range(1, 12))
    assert not any(store.are_apart(a[::4], at) for at in range(1, 3))
    assert not store.are_apart(a[[0, 4]], 1)
