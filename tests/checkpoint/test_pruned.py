"""One file holds a pruned network: it comes back bit for bit, or the reason is told."""

from __future__ import annotations

import copy
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as parse
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from secateur import checkpoint
from secateur.errors import CheckpointError, PlanError, UsageError
from secateur.graph import plan as plan_form
from secateur.graph.plan import PruningPlan
from secateur.models import lenet5, resnet20
from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut
from secateur.tracing.tracing import trace


class Net(nn.Module):
    """Two convolutions, batch norm and a linear layer, with buffers of odd kinds."""

    def __init__(self, width: int = 6, hidden: int = 5, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3, bias=bias)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, hidden, 3)
        self.fc = nn.Linear(hidden * 4, 3)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("table", torch.arange(6, dtype=torch.int16).reshape(2, 3).T)
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv1(x)).relu()
        return self.fc(self.conv2(x).relu().flatten(1))


class Tied(nn.Module):
    """Two layers that are one parameter under two names, and a buffer that is a view of another."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.a = nn.Conv2d(4, 4, 1, bias=False)
        self.b = nn.Conv2d(4, 4, 1, bias=False)
        if tie:
            self.b.weight = self.a.weight
        self.register_buffer("whole", torch.arange(6.0))
        self.register_buffer("part", self.whole[1:3])
        self.register_buffer("folded", self.whole.view(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.stem(x).relu()).relu())


EXAMPLE = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def bits(value: Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert list(a) == list(b)
    for name, value in b.items():
        assert a[name].dtype == value.dtype, name
        assert a[name].shape == value.shape, name
        assert bits(a[name]) == bits(value), name


def prune(model: nn.Module, removed: dict[str, list[int]], example: Tensor = EXAMPLE) -> tuple[nn.Module, PruningPlan]:
    plan = plan_removal(trace(model, example), removed)
    return cut(model, plan), plan


@st.composite
def programs(draw: st.DrawFn) -> tuple[dict[str, object], list[dict[str, list[int]]], torch.dtype]:
    width, hidden = draw(st.integers(2, 7)), draw(st.integers(2, 5))
    rounds = []
    sizes = {"conv1": width, "conv2": hidden}
    for _ in range(draw(st.integers(0, 3))):
        removed = {n: sorted(draw(st.sets(st.integers(0, k - 1), max_size=k - 1))) for n, k in sizes.items()}
        sizes = {n: k - len(removed[n]) for n, k in sizes.items()}
        # A layer of one filter can lose none and is no group.
        rounds.append({n: channels for n, channels in removed.items() if channels})
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return {"width": width, "hidden": hidden, "bias": draw(st.booleans())}, rounds, dtype


@settings(max_examples=40, deadline=None)
@given(programs(), st.integers(0, 2**31))
def test_any_chain_of_plans_comes_back_bit_for_bit(tmp_path_factory, program, seed):
    options, rounds, dtype = program
    torch.manual_seed(seed)
    model = Net(**options)
    plans = []
    for removed in rounds:
        model, plan = prune(model, removed)
        plans.append(plan)
    model = model.to(dtype)
    with torch.no_grad():
        model.bn.running_var.uniform_(0.5, 2)
        model.fc.weight[0, 0], model.fc.bias[0] = torch.nan, -0.0
    path = tmp_path_factory.mktemp("files") / "small.safetensors"
    checkpoint.save(model, plans, path, {"note": [1, "ü"]})
    fresh = Net(**options)
    before = copy.deepcopy(fresh.state_dict())
    loaded = checkpoint.load(fresh, path)
    assert type(loaded) is Net
    assert loaded is not fresh
    assert_same(loaded, model)
    assert all(torch.equal(fresh.state_dict()[n], v) for n, v in before.items()), "the model given is left as it was"
    x = EXAMPLE.to(dtype)
    assert bits(loaded.eval()(x)) == bits(model.eval()(x))
    assert checkpoint.read_header(path) == checkpoint.Header("Net", tuple(plans), {"note": [1, "ü"]}, {})
    assert checkpoint.is_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.uint8, torch.int64, torch.bool])
def test_every_storable_type_comes_back(tmp_path, dtype):
    model = nn.Module()
    model.register_buffer("x", (torch.arange(12) % 5).reshape(3, 4).to(dtype).T)
    model.register_buffer("scalar", torch.ones((), dtype=dtype))
    checkpoint.save(model, None, tmp_path / "f")
    fresh = nn.Module()
    fresh.register_buffer("x", torch.zeros(4, 3))
    fresh.register_buffer("scalar", torch.zeros(()))
    assert_same(checkpoint.load(fresh, tmp_path / "f"), model)


def test_channels_last_weights_keep_their_values(tmp_path):
    model = Net().to(memory_format=torch.channels_last)
    checkpoint.save(model, None, tmp_path / "f")
    assert_same(checkpoint.load(Net(), tmp_path / "f"), model)


def test_conjugate_views_are_stored_as_what_they_show(tmp_path):
    model = nn.Module()
    model.register_buffer("x", torch.tensor([1 + 2j, 3 - 1j]).conj())
    checkpoint.save(model, None, tmp_path / "f")
    assert load_file(tmp_path / "f")["x"].tolist() == [1 - 2j, 3 + 1j]


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model, plan = prune(Tied(), {})
    checkpoint.save(model, plan, tmp_path / "f")
    assert "b.weight" not in load_file(tmp_path / "f")
    assert checkpoint.read_header(tmp_path / "f").aliases == {"b.weight": "a.weight"}
    for fresh in (Tied(), Tied(tie=False)):
        loaded = checkpoint.load(fresh, tmp_path / "f")
        assert loaded.a.weight is loaded.b.weight
        assert_same(loaded, model)
    assert loaded.a.weight.requires_grad


def test_views_of_one_memory_are_stored_apart(tmp_path):
    model = Tied()
    model.whole += 1
    checkpoint.save(model, None, tmp_path / "f")
    tensors = load_file(tmp_path / "f")
    assert tensors["part"].tolist() == [2, 3]
    assert tensors["folded"].shape == (2, 3)
    assert_same(checkpoint.load(Tied(), tmp_path / "f"), model)


def test_weights_untied_after_building_are_refused_by_a_model_that_ties_them(tmp_path):
    checkpoint.save(Tied(tie=False), None, tmp_path / "f")
    with pytest.raises(CheckpointError, match=r"a.weight and b.weight are one tied tensor in the model given and two"):
        checkpoint.load(Tied(), tmp_path / "f")


def test_frozen_parameters_and_modes_are_the_fresh_models_own(tmp_path):
    checkpoint.save(Net(), None, tmp_path / "f")
    fresh = Net().eval()
    fresh.conv1.weight.requires_grad_(False)
    loaded = checkpoint.load(fresh, tmp_path / "f")
    assert not loaded.conv1.weight.requires_grad
    assert loaded.conv2.weight.requires_grad
    assert not loaded.training


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrappers_are_taken_off(tmp_path, wrap):
    model, plan = prune(Net(), {"conv1": [0, 3]})
    checkpoint.save(wrap(model), plan, tmp_path / "f")
    assert_same(checkpoint.load(Net(), tmp_path / "f"), model)


def test_same_network_gives_the_same_bytes(tmp_path):
    model, plan = prune(Net(), {"conv1": [0, 3]})
    checkpoint.save(model, plan, tmp_path / "a", {"k": 1})
    checkpoint.save(model, plan, tmp_path / "b", {"k": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_papers_networks_come_back(tmp_path):
    for build, shape, group in ((lenet5, (1, 1, 28, 28), "conv2"), (resnet20, (1, 3, 32, 32), "layer2.1.conv1")):
        model, plan = prune(build(), {group: [1, 4, 5]}, torch.zeros(shape))
        checkpoint.save(model, plan, tmp_path / "f")
        assert_same(checkpoint.load(build(), tmp_path / "f"), model)


# What is refused, and how it is said.


@pytest.fixture
def stored(tmp_path):
    model, plan = prune(Net(), {"conv1": [0, 3], "conv2": [1]})
    checkpoint.save(model, plan, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def rewrite(path, change, *, signed=False):
    """Change the JSON header of a file, or its tensors, and write it back, with a new digest where it is signed."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["secateur"])
    tensors = parse(content)
    change(header, tensors)
    if signed:
        header["sha256"] = checkpoint.pruned._digest(tensors, header)
    save_file(tensors, path, {"secateur": json.dumps(header)})


def test_a_model_of_another_class_is_refused(stored):
    class Other(Net):
        pass

    with pytest.raises(CheckpointError, match=r"holds a Net, and the model given is a .*Other"):
        checkpoint.load(Other(), stored)
    assert_same(checkpoint.load(Other(), stored, any_class=True), checkpoint.load(Net(), stored))
    with pytest.raises(CheckpointError, match="holds a Net, and the model given is a LeNet5"):
        checkpoint.load(lenet5(), stored)
    with pytest.raises(CheckpointError, match=r"conv1.weight has shape .* has \(20, 1, 5, 5\)"):
        checkpoint.load(lenet5(), stored, any_class=True)


def test_the_first_tensor_of_another_shape_is_named_with_both_shapes(stored):
    with pytest.raises(
        CheckpointError, match=r"has shape \(6,.*in the Net that was pruned, and the model given has \(8,"
    ):
        checkpoint.load(Net(width=8), stored)
    with pytest.raises(CheckpointError, match=r"conv1.bias has shape \(6,\) .* given has no such tensor"):
        checkpoint.load(Net(bias=False), stored)


def test_tensors_that_the_plan_does_not_touch_are_compared_too(tmp_path):
    model, plan = prune(Net(hidden=5), {"conv1": [2]})
    checkpoint.save(model, plan, tmp_path / "f")
    other = Net(hidden=5)
    other.fc = nn.Linear(20, 4)
    with pytest.raises(
        CheckpointError, match=r"fc.weight has shape \(3, 20\) in the file and \(4, 20\) in the Net given"
    ):
        checkpoint.load(other, tmp_path / "f")


def test_missing_and_unknown_tensors_are_counted_and_named(stored):
    def swap(header, tensors):
        tensors["head.weight"] = tensors.pop("fc.weight")

    rewrite(stored, swap, signed=True)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(Net(), stored)
    assert "1 tensor of the model not in the file (first: fc.weight)" in str(caught.value)
    assert "1 tensor of the file not in the model (first: head.weight)" in str(caught.value)


def test_a_deeper_network_of_the_same_class_is_refused(tmp_path):
    from secateur.models import resnet56

    model, plan = prune(resnet20(), {"layer1.0.conv1": [0]}, torch.zeros(1, 3, 32, 32))
    checkpoint.save(model, plan, tmp_path / "f")
    with pytest.raises(CheckpointError, match=r"tensors of the model not in the file \(first: layer1.3.conv1.weight\)"):
        checkpoint.load(resnet56(), tmp_path / "f")


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, share):
    path = tmp_path_factory.mktemp("files") / "f"
    checkpoint.save(Net(), None, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"empty|truncated|no safetensors file"):
        checkpoint.load(Net(), path)


def test_a_truncated_file_is_said_to_be_one(stored):
    stored.write_bytes(stored.read_bytes()[:-1])
    assert checkpoint.is_checkpoint(stored)
    with pytest.raises(CheckpointError, match="truncated or damaged; copy it again"):
        checkpoint.load(Net(), stored)


def test_a_header_written_by_another_hand_is_told_all_the_same(stored):
    content = stored.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), indent=2, ensure_ascii=True).encode()
    rewritten = len(header).to_bytes(8, "little") + header + content[8 + length :]
    stored.write_bytes(rewritten)
    assert checkpoint.is_checkpoint(stored)
    checkpoint.load(Net(), stored)
    stored.write_bytes(rewritten[: 8 + len(header) - 9])
    assert checkpoint.is_checkpoint(stored), "cut off within its header"


def test_a_tensor_named_as_the_metadata_is_makes_no_checkpoint(tmp_path):
    path = tmp_path / "f"
    save_file({"x": torch.zeros(2)}, path, {"note": '"secateur":"no"'})
    assert not checkpoint.is_checkpoint(path)


def test_a_flipped_bit_is_noticed(stored):
    content = bytearray(stored.read_bytes())
    content[-5] ^= 1
    stored.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged: the tensors or the plan aren't the ones that were saved"):
        checkpoint.load(Net(), stored)


def test_files_of_other_kinds_are_refused_each_with_its_kind(tmp_path):
    path = tmp_path / "f"
    save_file({"conv1.weight": torch.zeros(2, 2)}, path)
    assert not checkpoint.is_checkpoint(path)
    with pytest.raises(CheckpointError, match="not one of Secateur's: it holds no plan"):
        checkpoint.load(Net(), path)
    torch.save({"a": torch.zeros(2)}, path)
    assert not checkpoint.is_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"zip archive, as torch.save writes; expected a safetensors file"):
        checkpoint.load(Net(), path)
    path.write_text("model: lenet5\nweights: none\n")
    with pytest.raises(CheckpointError, match="this is no safetensors file"):
        checkpoint.load(Net(), path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty"):
        checkpoint.load(Net(), path)
    save_file({"secateur": torch.zeros(2)}, path)
    assert not checkpoint.is_checkpoint(path)


def test_newer_versions_are_refused_with_both_versions(stored):
    def newer_file(header, tensors):
        header["format_version"] = checkpoint.pruned.FORMAT_VERSION + 1

    def newer_plan(header, tensors):
        header["format_version"] = checkpoint.pruned.FORMAT_VERSION
        header["plans"][0]["version"] = plan_form.FORMAT_VERSION + 3
        header["plans"][0]["unheard_of"] = {}

    rewrite(stored, newer_file)
    with pytest.raises(CheckpointError, match=r"newer Secateur \(file format 3; this one reads up to 2\); upgrade"):
        checkpoint.load(Net(), stored)
    rewrite(stored, newer_plan)
    with pytest.raises(CheckpointError, match=rf"plan format {plan_form.FORMAT_VERSION + 3}; this one reads up to"):
        checkpoint.load(Net(), stored)


@pytest.mark.parametrize("key", ["format_version", "model", "plans", "extra", "aliases", "sha256"])
def test_a_header_without_a_part_is_refused(stored, key):
    rewrite(stored, lambda header, tensors: header.pop(key))
    with pytest.raises(CheckpointError, match="the plan in the metadata can't be read"):
        checkpoint.load(Net(), stored)


def test_a_file_of_the_first_version_is_read(stored):
    """Its digest is of the tensors alone."""
    rewrite(stored, lambda header, tensors: header.update(format_version=1), signed=True)
    assert checkpoint.load(Net(), stored).conv1.out_channels == 4
    rewrite(stored, lambda header, tensors: header.update(format_version=2))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(Net(), stored)


def test_the_digest_covers_the_plan(stored):
    def touch(header, tensors):
        header["plans"][0]["removed"]["conv1"] = [0, 4]

    rewrite(stored, touch)
    with pytest.raises(CheckpointError, match="damaged: the tensors or the plan aren't the ones that were saved"):
        checkpoint.load(Net(), stored)


@pytest.mark.parametrize(
    ("field", "name", "value", "message"),
    [
        ("kept_outputs", "bn", [0], "bn: the plan expects a convolution or linear layer; the model has BatchNorm2d"),
        ("kept_outputs", "conv1", [1, 2, 4, 6], "conv1: the plan keeps 6 among the output channels, of which"),
        ("kept_outputs", "conv1", [1, 2, 4, -1], "kept_outputs.conv1.3: should be greater than or equal to 0"),
        ("kept_outputs", "conv1", [1, 2, 4, 4], "kept_outputs.conv1: an index stands twice"),
        ("kept_outputs", "conv1", [1, 2, 4, 5.0], "kept_outputs.conv1.3: should be a valid integer, found 5.0"),
        ("kept_outputs", "conv1", [], "conv1: the plan keeps none of its 6 output channels"),
        ("kept_inputs", "fc", [20], "fc: the plan keeps 20 among the input channels, of which there are 20"),
        ("kept_tensors", "gone", {"0": [0]}, "gone: no such parameter or buffer"),
        ("kept_tensors", "bn.bias", {"1": [0]}, "bn.bias: has no dimension 1"),
        ("kept_tensors", "bn.bias", {"0": [9]}, "bn.bias: the plan keeps 9 among the indices of dimension 0"),
        ("reads", "bn.bias", {"0": [9]}, "bn.bias: the plan keeps 9 among the indices of dimension 0"),
        ("blocks", "conv2.weight", 4, "conv2.weight: blocks: 4 do not divide the rows of such a weight"),
        ("magnitudes", "bn.bias", ["bn.weight", 0], "bn.bias: no magnitude of a direction that is cut"),
        ("magnitudes", "bn.bias", ["conv1.weight", 1], "bn.bias: no magnitude of a direction that is cut"),
        ("attributes", "bn", {"eps": 5}, "bn: eps of a BatchNorm2d counts no channels"),
        ("attributes", "bn", {"num_features": 0}, "bn: num_features can't be 0: it is 6"),
        ("attributes", "bn", {"num_features": 7}, "bn: num_features can't be 7: it is 6"),
        ("attributes", "bn", {"training": 1}, "bn: it has no attribute 'training' that counts channels"),
        ("attributes", "bn", {"forward": 1}, "bn: it has no attribute 'forward' that counts channels"),
        ("attributes", "bn", {"num_features[1]": 1}, r"bn: num_features\[1\] can't be 1"),
        ("attributes", "nothing", {"width": 1}, "nothing: it has no attribute 'width'"),
        ("shapes", "bn.bias", [7], r"bn.bias has shape \(7,\)"),
    ],
)  # fmt: skip
def test_a_plan_that_no_trace_makes_is_refused(stored, field, name, value, message):
    rewrite(stored, lambda header, tensors: header["plans"][0][field].update({name: value}), signed=True)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(Net(), stored)


def test_a_missing_file_is_a_usage_error(tmp_path):
    for read in (checkpoint.is_checkpoint, checkpoint.read_header, lambda p: checkpoint.load(Net(), p)):
        with pytest.raises(UsageError, match=r"gone.safetensors: no such file"):
            read(tmp_path / "gone.safetensors")
        with pytest.raises(UsageError, match="can't be read"):
            read(tmp_path)


def odd(value: object) -> nn.Module:
    model = nn.Module()
    model.register_buffer("odd", value)
    return model


class WithExtraState(nn.Module):
    def get_extra_state(self):
        return {"step": 3}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: odd(torch.zeros(2, device="meta")), "odd is a tensor on the meta device"),
        (lambda: odd(torch.eye(3).to_sparse()), "layout torch.sparse_coo"),
        (lambda: odd(torch.zeros(2, dtype=torch.complex128)), "a tensor's type can't be stored"),
        (lambda: nn.LazyLinear(3), "weight is a lazy parameter without a shape"),
        (WithExtraState, "_extra_state is extra state of type dict"),
    ],
)
def test_what_safetensors_has_no_form_for_is_refused_by_name(tmp_path, model, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(model(), None, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_data_is_refused(stored):
    with torch.device("meta"):
        fresh = Net()
    with pytest.raises(UsageError, match=r"conv1.weight of the model given has no data"):
        checkpoint.load(fresh, stored)


@pytest.mark.parametrize("extra", [{"a": torch.zeros(1)}, {"a": float("nan")}])
def test_extra_that_is_no_json_is_refused(tmp_path, extra):
    with pytest.raises(UsageError, match="extra holds something that JSON has no form for"):
        checkpoint.save(Net(), None, tmp_path / "f", extra)


def test_a_class_whose_own_loading_changes_values_is_refused(stored):
    class Rounding(Net):
        def _load_from_state_dict(self, state, prefix, *rest):
            super()._load_from_state_dict(state, prefix, *rest)
            self.steps.add_(1)

    with pytest.raises(CheckpointError, match="steps isn't what the file holds"):
        checkpoint.load(Rounding(), stored, any_class=True)


# A network knows its plans


def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(EXAMPLE.repeat(3, 1, 1, 1)).square().mean().backward()
    optimizer.step()
    return model


def test_what_was_trained_on_is_saved_without_its_plans_also_after_loading(tmp_path):
    model, first = prune(Net(), {"conv1": [1]})
    model, second = prune(trained(model), {"conv2": [0, 3]})
    checkpoint.save(trained(copy.deepcopy(model)), path=tmp_path / "a")
    assert checkpoint.read_header(tmp_path / "a").plans == (first, second)
    again = trained(checkpoint.load(Net(), tmp_path / "a"))
    checkpoint.save(again, path=tmp_path / "b")
    assert_same(checkpoint.load(Net(), tmp_path / "b"), again)


def test_a_network_pickled_whole_knows_its_plans_and_opens_without_this_package(tmp_path):
    model, plan = prune(Net(), {"conv1": [1]})
    torch.save(model, tmp_path / "whole.pt")
    assert b"secateur." not in (tmp_path / "whole.pt").read_bytes()
    # A pickle that this test has written itself: users keep whole networks so, and the plans have to survive it.
    checkpoint.save(torch.load(tmp_path / "whole.pt", weights_only=False), path=tmp_path / "a")
    assert checkpoint.read_header(tmp_path / "a").plans == (plan,)


@pytest.mark.parametrize("number", range(5))
def test_a_network_that_the_plan_did_not_make_is_not_saved(tmp_path, number):
    small, plan = prune(Net(), {"conv1": [1]})
    other, widest = prune(Net(), {"conv1": [2]})[1], prune(Net(), {"conv1": [1, 2]})[1]
    unknowing = Net(5)
    unknowing.load_state_dict(small.state_dict())
    checkpoint.save(unknowing, plan, tmp_path / "f")
    model, given, part = [
        (Net(), plan, "conv1: outputs: the plan leaves 5, and the network has 6"),
        (small, other, "is not the one that made this network"),
        (small, (plan, other), "is not the one that made this network"),
        (unknowing, widest, "conv1: outputs: the plan leaves 4, and the network has 5"),
        (nn.Sequential(nn.Conv2d(2, 5, 3)), plan, "conv1: the plan keeps channels of it"),
    ][number]
    with pytest.raises(PlanError, match=part) as raised:
        checkpoint.save(model, given, tmp_path / "g")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "g").exists()


def test_where_to_save_is_asked(tmp_path):
    with pytest.raises(UsageError, match="Pass path="):
        checkpoint.save(Net())
    with pytest.raises(UsageError, match=r"save\(ema\.module\)"):
        checkpoint.save(AveragedModel(Net()), path=tmp_path / "f")


def test_a_plain_state_dict_is_loaded_with_the_plan_beside_it(tmp_path):
    model, plan = prune(Net(), {"conv1": [1]})
    torch.save(trained(model).state_dict(), tmp_path / "small.pt")
    (tmp_path / "plan.json").write_text(plan.to_json())
    again = cut(Net(), PruningPlan.from_json((tmp_path / "plan.json").read_text()))
    again.load_state_dict(checkpoint.load_weights(tmp_path / "small.pt"))
    assert_same(again, model)
    checkpoint.save(again, path=tmp_path / "a")
    assert_same(checkpoint.load(Net(), tmp_path / "a"), model)
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load(Net(), tmp_path / "small.pt")
    assert "a state dict alone fits what apply(model, plan) returns" in str(raised.value)
