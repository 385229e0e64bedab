"""The registry: what a criterion from outside looks like, and what is refused."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.criteria import (
    Criterion,
    Need,
    Returns,
    Selection,
    criterion,
    get,
    names,
    register,
    registry,
    scoring,
    unregister,
)
from secateur.errors import CriterionError, UsageError
from secateur.tracing.tracing import trace


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    for name in ("linf", "first"):
        unregister(name)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))


def linf(filters: Tensor) -> Tensor:
    return filters.abs().amax(1)


def test_ten_lines_make_a_criterion(model: nn.Module) -> None:
    criterion("linf", needs=["filters"], source="largest absolute weight")(linf)
    graph = trace(model, torch.zeros(1, 2, 9, 9))
    scores = scoring.score(model, graph, "linf")
    torch.testing.assert_close(scores["0"], model[0].weight.detach().abs().amax((1, 2, 3)).double())  # type: ignore[index, union-attr, operator]
    assert "linf" in names()
    assert not get("linf").needs_data


def test_a_function_needs_no_registration(model: nn.Module) -> None:
    graph = trace(model, torch.zeros(1, 2, 9, 9))
    expected = scoring.score(model, graph, linf)
    torch.testing.assert_close(scoring.score(model, graph, lambda filters: filters.abs().amax(1)), expected)
    assert get(get("l1").function) is get("l1")
    with pytest.raises(UsageError, match="no parameter is named after a need"):
        get(lambda weights: weights)


def test_a_selection_of_ones_own_gives_scores_too(model: nn.Module) -> None:
    @criterion("first", needs=["filters"], returns="selection")
    def first(filters: Tensor, remove: int) -> Selection:
        return Selection(tuple(range(remove)))

    graph = trace(model, torch.zeros(1, 2, 9, 9))
    assert scoring.select(model, graph, "first", {"0": 2})["0"].removed == (0, 1)
    assert scoring.score(model, graph, "first")["0"].tolist() == [0.0, 0.25, 0.5, 1.0]


def point(value: str, monkeypatch: pytest.MonkeyPatch, name: str = "linf") -> None:
    found = {name: EntryPoint(name, value, registry.ENTRY_POINT_GROUP)}
    monkeypatch.setattr(registry._registry, "pending", found)


def test_an_entry_point_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "outside.py").write_text(
        "from secateur.criteria import criterion\n"
        "@criterion('linf', needs=['filters'])\n"
        "def linf(filters):\n"
        "    return filters.abs().amax(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    point("outside", monkeypatch)
    assert "linf" in names()
    assert get("linf").needs == {Need.FILTERS}


def test_an_entry_point_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    point("nowhere.to.be.found", monkeypatch)
    with pytest.raises(CriterionError, match=r"linf: entry point nowhere.to.be.found can't be loaded"):
        get("linf")
    point("math", monkeypatch)
    with pytest.raises(CriterionError, match="registers no criterion of that name"):
        get("linf")


def test_an_unknown_name_lists_what_is_known_and_what_is_near() -> None:
    with pytest.raises(UsageError, match=r"unknown criterion 'corrnett'. Did you mean corrnet\? Known: .*chip"):
        get("corrnett")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Criterion("l1", linf), "the name is taken"),
        (Criterion("linf", linf, per_batch=linf), "needs neither"),
        (Criterion("linf", linf, frozenset({Need.MAPS}), Returns.SELECTION), "can't be averaged"),
        (Criterion("linf", linf, frozenset({Need.MAPS, Need.GRADIENTS})), "Ask for one"),
    ],
)
def test_a_criterion_that_contradicts_itself_is_refused(made: Criterion, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        register(made)


def test_unknown_needs_and_options_are_refused(model: nn.Module) -> None:
    with pytest.raises(UsageError, match="weights"):
        criterion("linf", needs=["weights"])
    graph = trace(model, torch.zeros(1, 2, 9, 9))
    with pytest.raises(UsageError, match=r"l1: unknown option 'treshold'. It takes none"):
        scoring.score(model, graph, "l1", treshold=1)
    with pytest.raises(UsageError, match=r"corrnet: unknown option 'treshold'. It takes threshold"):
        scoring.select(model, graph, "corrnet", 0.5, [torch.zeros(1, 2, 9, 9)], treshold=1)
    with pytest.raises(UsageError, match=r"corrnet: unknown option 'treshold'. It takes threshold"):
        scoring.score(model, graph, "corrnet", [torch.zeros(1, 2, 9, 9)], treshold=1)
    with pytest.raises(UsageError, match=r"corrnet: 'threshold' is an option of a selection and changes no score"):
        scoring.score(model, graph, "corrnet", [torch.zeros(1, 2, 9, 9)], threshold=0.5)


def test_every_built_in_criterion_says_where_it_comes_from() -> None:
    built_in = [name for name in names() if get(name).function.__module__.startswith("secateur.")]
    assert len(built_in) >= 13
    for name in built_in:
        assert get(name).source
        assert get(name).function.__doc__
