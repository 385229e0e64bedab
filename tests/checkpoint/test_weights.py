"""Plain state dicts of every usual shape are read; nothing foreign is unpickled."""

from __future__ import annotations

import argparse
import pickle

import pytest
import torch
from safetensors.torch import save_file

from secateur.checkpoint import load_weights
from secateur.errors import CheckpointError, UsageError

STATE = {"conv.weight": torch.randn(2, 3), "conv.steps": torch.tensor(4)}


def same(found, expected=STATE):
    assert list(found) == list(expected)
    assert all(torch.equal(found[n], v) and found[n].dtype == v.dtype for n, v in expected.items())


def test_safetensors_are_told_by_content_not_by_name(tmp_path):
    save_file(STATE, tmp_path / "w.pth")
    assert {n: v.tolist() for n, v in load_weights(tmp_path / "w.pth").items()} == {
        n: v.tolist() for n, v in STATE.items()
    }
    torch.save(STATE, tmp_path / "w.safetensors")
    same(load_weights(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_is_read(tmp_path, legacy):
    torch.save(STATE, tmp_path / "w", _use_new_zipfile_serialization=not legacy)
    same(load_weights(tmp_path / "w"))


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
def test_a_nested_state_dict_is_found(tmp_path, key):
    torch.save({"epoch": 3, key: STATE}, tmp_path / "w")
    same(load_weights(tmp_path / "w"))


def test_a_layer_of_a_nesting_keys_name_is_no_nesting(tmp_path):
    state = {"model": torch.zeros(1), "net": torch.ones(1)}
    torch.save(state, tmp_path / "w")
    same(load_weights(tmp_path / "w"), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_that_all_keys_carry_are_taken_off(tmp_path, prefix):
    torch.save({prefix + name: value for name, value in STATE.items()}, tmp_path / "w")
    same(load_weights(tmp_path / "w"))


def test_a_prefix_that_one_key_lacks_stays(tmp_path):
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(state, tmp_path / "w")
    same(load_weights(tmp_path / "w"), state)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("foreign code ran",))


@pytest.mark.parametrize(
    "content", [{"state_dict": STATE, "args": argparse.Namespace(lr=1)}, Bomb(), {"x": Bomb(), "state_dict": STATE}]
)
def test_pickled_objects_are_refused_and_not_run(tmp_path, content):
    torch.save(content, tmp_path / "w")
    with pytest.raises(CheckpointError, match="pickled objects beside tensors, and these are never unpickled"):
        load_weights(tmp_path / "w")
    (tmp_path / "w").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError):
        load_weights(tmp_path / "w")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "found an empty mapping"),
        ([torch.zeros(1)], "found a list"),
        (torch.zeros(2), "found a Tensor"),
        ({"epoch": 3, "lr": 0.1}, "found 'epoch': int"),
        ({"state_dict": {"a": "text"}}, "found 'a': str"),
        ({3: torch.zeros(1)}, "found 3: Tensor"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "w")
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path / "w")


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load_weights(tmp_path / "w")
    torch.save(STATE, tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    for content in (b"", b"garbage", whole[:-50], whole[: len(whole) // 2], b"\x80\x02."):
        (tmp_path / "w").write_bytes(content)
        with pytest.raises(CheckpointError, match="neither a safetensors file nor a"):
            load_weights(tmp_path / "w")
    save_file(STATE, tmp_path / "w")
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_weights(tmp_path / "w")
