"""Labels through reshapes, by laying every element's label out in full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.tracing import labels
from secateur.tracing.labels import LabelStore, merged, runs, varying


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=6))

    def grouped() -> tuple[int, ...]:
        shape = [1]
        for factor in factors:
            if draw(st.booleans()):
                shape.append(1)
            shape[-1] *= factor
        return tuple(shape)

    return grouped(), grouped()


@given(reshapes())
def test_runs_have_equal_products_and_cover_every_dimension(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    old, new = shapes
    found = runs(old, new)
    for left, right in found:
        assert np.prod([old[d] for d in left]) == np.prod([new[d] for d in right])
    assert [d for left, _ in found for d in left] == [d for d, n in enumerate(old) if n > 1]
    assert [d for _, right in found for d in right] == [d for d, n in enumerate(new) if n > 1]


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4), st.data())
def test_merged_is_the_reshape_of_the_laid_out_labels(shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    vector = np.arange(shape[dim])
    full = np.empty(shape, dtype=np.int64)
    for index in np.ndindex(*shape):
        full[index] = vector[index[dim]]
    assert merged(vector, range(len(shape)), dim, shape).tolist() == full.reshape(-1).tolist()


def test_varying_names_the_axes_along_which_labels_differ() -> None:
    assert varying(np.array([[0, 0], [1, 1]])) == [0]
    assert varying(np.array([[0, 1], [0, 1]])) == [1]
    assert varying(np.array([[0, 1], [2, 3]])) == [0, 1]
    assert varying(np.zeros((2, 3), dtype=np.int64)) == []


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
    classes = store.classes()
    for a in range(count):
        for b in range(count):
            assert (classes[a] == classes[b]) == (parent[a] == parent[b])
    first = [int(np.flatnonzero(classes == number)[0]) for number in range(int(classes.max()) + 1)]
    assert first == sorted(first)


def test_arrays_are_joined_label_by_label_broadcasting() -> None:
    store = LabelStore()
    rows, columns = store.fresh(3)[:, None], store.fresh(6).reshape(3, 2)
    store.join(rows, columns)
    assert store.classes().tolist() == [0, 1, 2, 0, 0, 1, 1, 2, 2]


def test_of_labels_the_parameters_are_found_and_what_they_are_computed_from() -> None:
    weights = True
    store = LabelStore(lambda: weights)
    a, b, c, d = (store.fresh_for(name, 0, 3) for name in "abcd")
    store.fresh(2)
    store.join(a[:2], b[1:])
    weights = False
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
