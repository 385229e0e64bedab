import copy
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from bench import accuracy, accuracy_figure, accuracy_peers, accuracy_tables, sections
from bench.accuracy_arms import AUTO, OURS, RANDOM, SCRATCH, UNIFORM, UNPRUNED, Setting, cut
from bench.accuracy_cells import PARTS, PEAKS, Cell, Part, of_row, peaks, rivals, store
from bench.accuracy_peers import IMPORTANCES, KIRIGAMI, ONE_SHOT, SCOPES, SPARSE
from bench.accuracy_training import Half, Measuring
from bench.rows import Row
from secateur.data import Batches, DataBundle, ImageTensors, Normalise
from secateur.data.tensors import CropFlip
from secateur.models import CifarResNet, PadShortcut
from secateur.training.stages import Stage

INNER = {"layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"}


def part_of_images(count: int, seed: int, augmentation: CropFlip | None = None) -> ImageTensors:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return ImageTensors(images, labels, Normalise((0.5,) * 3, (0.25,) * 3), augmentation)


def setting(layers: str = "inner") -> Setting:
    torch.manual_seed(0)
    model = CifarResNet(8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    parts = part_of_images(300, 0, CropFlip()), part_of_images(20, 1), part_of_images(20, 2)
    data = DataBundle("noise", *parts, (3, 32, 32), ("a",) * 10)
    return Setting(model.eval(), data, layers, seen=48)


@pytest.fixture(scope="module")
def inner() -> Setting:
    return setting()


def shrunk(own: Setting, small: nn.Module) -> set[str]:
    sizes = {n: m.out_channels for n, m in own.model.named_modules() if isinstance(m, nn.Conv2d)}
    return {n for n, m in small.named_modules() if isinstance(m, nn.Conv2d) and m.out_channels < sizes[n]}


QUICK = (UNIFORM, RANDOM, SCRATCH, "redundancy global + least squares", "l2", "Hessian")


def slow_but(names: Iterable[str]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("arm", slow_but([*OURS, AUTO, SCRATCH]))
def test_each_of_our_arms_removes_what_is_asked_for_from_the_inner_filters_alone(inner: Setting, arm: str) -> None:
    before = copy.deepcopy(inner.model.state_dict())
    small = cut(inner, arm, 0.4, seed=1)
    assert 0.4 <= inner.removed(small) < 0.44
    assert shrunk(inner, small) <= INNER
    assert all(torch.equal(before[name], value) for name, value in inner.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["inner", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("importance", slow_but(IMPORTANCES))
def test_each_arm_of_the_peer_removes_about_what_is_asked_for(layers: str, importance: str, scope: str) -> None:
    own = setting(layers)
    small = accuracy_peers.cut(own, f"TP {importance} {scope}", 0.4, seed=1)
    assert own.removed(small) >= 0.4 - accuracy_peers.SLACK
    gone = shrunk(own, small)
    assert gone <= INNER if layers == "inner" else gone
    assert small(own.example).shape == (2, 10)
    assert not any("_importance" in vars(m) for m in small.modules())
    assert all(p.grad is None for p in [*small.parameters(), *own.model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("arm", KIRIGAMI)
def test_each_arm_of_the_other_peer_cuts_the_inner_filters_alone(inner: Setting, arm: str) -> None:
    small = accuracy_peers._folded(inner, arm, 0.5, seed=1)
    assert 0.4 <= inner.removed(small) < 0.6
    assert shrunk(inner, small) == INNER
    assert small(inner.example).shape == (2, 10)


def test_a_plain_shortcut_pads_like_the_one_that_it_stands_for(inner: Setting) -> None:
    plain = accuracy_peers._plain_shortcuts(copy.deepcopy(inner.model))
    assert not [m for m in plain.modules() if isinstance(m, PadShortcut)]
    assert torch.equal(plain(inner.example), inner.model(inner.example))


def test_the_peer_with_shortcuts_of_zeros_cuts_what_zeroing_gives() -> None:
    own = setting("all")
    model = copy.deepcopy(own.model)
    accuracy_peers._pruner(own, model, Lowest(), 0.25, "local").step()
    graph = own.graph
    removed = {g.name: list(range(g.size // 4)) for g in graph.groups}
    expected = sc.apply(own.model, sc.plan_removal(graph, removed))
    torch.testing.assert_close(model.eval()(own.example), expected(own.example), rtol=1e-5, atol=1e-5)


class Lowest:
    """An importance by which the first channels go."""

    def __call__(self, group: Any) -> torch.Tensor:
        return torch.arange(len(group[0].idxs), dtype=torch.float32)


@pytest.mark.slow
def test_gradients_that_the_peer_gets_are_means_over_the_images(inner: Setting) -> None:
    mean = accuracy_peers._gradients(inner, 3, squared=False)["linear.weight"]
    root = accuracy_peers._gradients(inner, 3, squared=True)["linear.weight"]
    model = copy.deepcopy(inner.model)
    each = []
    for x, y in inner.few(3):
        for i in range(len(x)):
            model.zero_grad()
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            each.append(model.linear.weight.grad.clone())
    torch.testing.assert_close(mean, torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(root, torch.stack(each).square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)


def test_from_scratch_has_the_widths_of_uniform_and_weights_of_its_seed(inner: Setting) -> None:
    one, same, other = (cut(inner, SCRATCH, 0.4, seed) for seed in (1, 1, 2))
    shapes = [{n: t.shape for n, t in net.state_dict().items()} for net in (one, cut(inner, UNIFORM, 0.4, 1))]
    assert shapes[0] == shapes[1]
    weights = [net.get_parameter("layer1.0.conv1.weight") for net in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def measuring(work: Path) -> Measuring:
    found = Measuring(work, "noise", work)
    found.loaded |= {("tiny", "inner", images): setting() for images in (0, 300)}
    return found


@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("tiny", "inner", 0.4, "l1", 3, 300, seed=2, distilled=True, peak=0.01)
    whole = measuring(tmp_path / "a")
    expected = whole.trained(cell, whole.setting("tiny", "inner", 300))
    run_epoch = Stage.run_epoch
    calls = []

    def killed(self: Stage, batches: Any, epoch: int, on_batch: Any = None) -> Any:
        calls.append(epoch)
        if calls == [0, 1, 2]:
            raise KeyboardInterrupt
        return run_epoch(self, batches, epoch, on_batch)

    monkeypatch.setattr(Stage, "run_epoch", killed)
    first = measuring(tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        first.trained(cell, first.setting("tiny", "inner", 300))
    again = measuring(tmp_path / "b")
    found = again.trained(cell, again.setting("tiny", "inner", 300))
    assert calls == [0, 1, 2, 2]
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in expected.state_dict().items())
    assert not list((tmp_path / "b" / "training").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["l1", AUTO, SCRATCH, SPARSE, "TP l2 global"])
def test_a_trained_cell_is_a_row_with_its_figures(tmp_path: Path, arm: str) -> None:
    row = measuring(tmp_path).row(Cell("tiny", "inner", 0.4, arm, 1, 300, peak=0.01))
    assert row["removed"] >= 0.39
    assert 0 <= row["accuracy"] <= 100
    assert 0 <= row["validation"] <= 100
    assert row["seconds"] > 0


@pytest.mark.slow
def test_what_a_peer_cannot_do_is_a_row_with_the_reason(tmp_path: Path) -> None:
    row = measuring(tmp_path).row(Cell("tiny", "inner", 0.99, "TP l2 local"))
    assert row["failed"] == "the MACs asked for can't be removed, 99%"


def test_half_an_epoch_is_the_first_half_of_its_batches() -> None:
    batches = Batches(part_of_images(300, 0), 50, shuffle=True)
    half = Half(batches)
    half.set_epoch(3)
    found = list(half)
    assert len(found) == len(half) == 3
    assert all(torch.equal(a[0], b[0]) for a, b in zip(found, batches, strict=False))


def test_the_penalty_shrinks_groups_and_is_gone_afterwards(inner: Setting) -> None:
    model = copy.deepcopy(inner.model)
    weight = model.get_parameter("layer1.0.conv1.weight")
    optimizer = torch.optim.SGD([weight], lr=1.0)
    before = weight.detach().clone()
    for expected_change in (True, False):
        weight.grad = torch.zeros_like(weight)
        if expected_change:
            with accuracy_peers.shrinking(inner, model):
                optimizer.step()
            assert weight.norm() < before.norm()
            before = weight.detach().clone()
        else:
            optimizer.step()
            assert torch.equal(weight, before)


class Fake(Measuring):
    """Measures nothing: an arm's accuracy follows from its name, epochs and peak."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "", folder)
        self.order: list[Cell] = []

    def row(self, cell: Cell) -> Row:
        # LAMP comes to the network of l2, as it does with one ratio for all layers.
        known = {"TP l2 local": 50.0, "TP LAMP local": 50.0, "TP LAMP global": 49.0, AUTO: 80.0}
        value = known.get(cell.arm, 10.0)
        bonus = 5.0 * cell.epochs - 100 * abs(cell.peak - 0.01) if cell.epochs else 0.0
        self.order.append(cell)
        measured = {"validation": value + bonus} if cell.epochs else {}
        return cell.row(accuracy=value + bonus, removed=cell.fraction, seconds=1.0, **measured)


PART = Part("resnet20", "inner", (0.5, 0.25), (UNIFORM, *ONE_SHOT, AUTO), (UNIFORM, AUTO), 2, (3, 1), (0, 1), 300)


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Any, list[Cell]]:
    kept = store("rows.jsonl", folder=tmp_path)
    fake = Fake(tmp_path)
    accuracy.run([PART], kept, fake, 1)
    return kept, fake.order


def test_waves_train_the_best_of_the_peer_from_the_best_peaks_and_auto_last(rows: Any) -> None:
    kept, order = rows
    assert rivals(kept.read(), PART, 0.5) == ("TP LAMP local", "TP LAMP global")
    trained = {c.arm for c in order if c.epochs}
    assert trained == {"TP LAMP local", "TP LAMP global", UNIFORM, AUTO}
    places = [c.arm == AUTO for c in order]
    assert places == sorted(places)
    assert len(order) == len(set(order))
    for arm in trained:
        own = [c for c in order if c.arm == arm and c.epochs]
        # Two fractions, two lengths, two seeds; and the two peaks that were tried and did worse.
        assert len(own) == 8 + 2
        assert {c.peak for c in own if (c.epochs, c.seed) != (1, 0)} == {0.01}
        assert {c.seed for c in order if c.arm == arm and not c.epochs} == {0, 1}
    assert {c.seed for c in order if c.arm == "TP l1 local"} == {0}


def test_a_second_run_measures_nothing_and_a_forgotten_arm_again(rows: Any, tmp_path: Path) -> None:
    kept, order = rows
    again = Fake(tmp_path)
    accuracy.run([PART], kept, again, 1)
    assert again.order == []
    accuracy.forget(kept, AUTO)
    accuracy.run([PART], kept, again, 1)
    assert again.order == [c for c in order if c.arm == AUTO]


def test_rows_are_published_in_place_of_the_old_ones_of_their_arm(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = rows
    results = store(folder=tmp_path / "results")
    monkeypatch.setattr(accuracy, "STORE", results)
    monkeypatch.setattr(accuracy_tables, "STORE", results)
    monkeypatch.setattr(sections, "DOCS", tmp_path)
    other = Cell("resnet56", "inner", 0.5, AUTO, 3, 300, 0, True, 0.01).row(accuracy=1.0, validation=1.0, removed=0.5)
    stale = replace(of_row(other), network="resnet20", peak=0.02).row(accuracy=2.0, validation=2.0, removed=0.5)
    results.keep(other)
    results.keep(stale)
    accuracy.publish(kept)
    assert results.read() == sorted([*kept.read(), other], key=results.name)
    assert accuracy_tables.render() in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "accuracy.svg").read_text() == accuracy_tables.draw()


def test_named_arms_alone_are_measured(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    accuracy.run([PART], store("rows.jsonl", folder=tmp_path), fake, 1, [AUTO])
    assert {cell.arm for cell in fake.order} == {AUTO}
    assert {cell.epochs for cell in fake.order} == {0, 1, 3}


def test_what_would_be_measured_is_told_beforehand(rows: Any) -> None:
    kept, order = rows
    supposed = accuracy.supposed([PART], [])
    assert len(supposed) == len(order)
    assert accuracy.supposed([PART], kept.read()) == []
    assert accuracy.cost(supposed).startswith(f"{len(order)} cells to measure, about ")
    for parts in PARTS.values():
        assert accuracy.supposed(parts[:1], [])
    quick = accuracy.supposed(PARTS["quick"], [])
    assert sum(cell.seconds for cell in quick) < 2 * 30 * 60


def test_the_command_lists_cells_with_their_cost_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["accuracy", "--quick", "--dry", "--arms", AUTO, "--rows", str(tmp_path / "r.jsonl")]
    )
    accuracy.main()
    *cells, total = capsys.readouterr().out.splitlines()
    assert len(cells) == 1 + len(PEAKS)
    assert all(" min  resnet20 inner 50%, auto, " in line for line in cells)
    assert total.startswith("--quick: 4 cells to measure, about 0.")
    assert not list(tmp_path.iterdir())
    rows = str(tmp_path / "r.jsonl")
    monkeypatch.setattr("sys.argv", ["accuracy", "--quick", "--weights", str(tmp_path), "--rows", rows])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert f"--weights {tmp_path}: there is no cifar10-resnet20.safetensors in it." in capsys.readouterr().err


def test_a_peak_counts_once_all_were_tried() -> None:
    cells = [Cell("n", "inner", 0.5, "l1", 1, 300, distilled=True, peak=p) for p in PEAKS]
    found = [cell.row(validation=v, accuracy=0.0) for cell, v in zip(cells, (1.0, 3.0, 3.0), strict=True)]
    assert peaks(found[:2]) == {}
    assert peaks(found) == {("n", "inner", "l1", 300, True): PEAKS[2]}  # of equal ones the larger


def test_tables_show_chosen_peaks_means_and_deviations(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = rows
    kept.keep(Cell("resnet20", "inner", 0.5, "torch-kirigami Taylor local").row(failed="it can't"))
    seeded = Cell("resnet20", "inner", 0.5, AUTO, 3, 300, 1, True, 0.01)
    kept.keep(seeded.row(accuracy=91.0, validation=0.0, removed=0.5, seconds=1.0))
    monkeypatch.setattr(accuracy_tables, "STORE", kept)
    text = accuracy_tables.render()
    after = text[text.index("After training") :]
    assert "| 25%, 1 epoch | 25%, 3 epochs | 50%, 1 epoch | 50%, 3 epochs |" in after
    # Seeds 0 and 1 at 50% after 3 epochs: 95 and 91.
    assert "| auto | Secateur | 85.00 ± 0.00 | 95.00 ± 0.00 | 85.00 ± 0.00 | 93.00 ± 2.83 |" in after
    assert "| TP LAMP local | Torch-Pruning | 55.00 ± 0.00 |" in after
    assert after.index("| auto |") < after.index("| TP LAMP local |") < after.index(f"| {UNIFORM} |")
    assert "- not measured, it can't: torch-kirigami Taylor local" in text
    assert "Peaks chosen: 0.01 by 4 arms." in text


def test_the_figure_is_drawn_from_the_rows(rows: Any) -> None:
    kept, _ = rows
    shown = accuracy_tables.counted(kept.read())
    (_, before, _), (title, after, unpruned) = accuracy_figure.panels(shown)
    assert before[accuracy_figure.BEST] == [(0.25, 50.0), (0.5, 50.0)]
    assert after[AUTO] == [(0.25, 95.0), (0.5, 95.0)]
    assert unpruned == 10.0
    assert title == "resnet20, inner filters: 3 × 300 images"
    text = accuracy_figure.draw(shown)
    root = ET.fromstring(text)
    circles = [node for node in root.iter() if node.tag.endswith("circle")]
    assert len(circles) == sum(len(line) for lines in (before, after) for line in lines.values())
    assert text == accuracy_figure.draw(list(reversed(shown)))


def test_arms_have_one_name_each() -> None:
    names = [*OURS, *ONE_SHOT, *KIRIGAMI, AUTO, SCRATCH, SPARSE, UNPRUNED]
    assert len(names) == len(set(names))
    assert RANDOM in OURS
