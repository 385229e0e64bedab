"""Folders in the layout of a model hub: written, read back to the bit, and refused where they name anything else."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import secateur as sc
from secateur.errors import CheckpointError, UsageError

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_network_of_ones_own_goes_into_a_folder_and_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    data = [(X, torch.tensor([0, 1]))]
    result = sc.prune(model, X, sc.Target(macs=0.5), method="l1", test=data)
    small = sc.apply(result.model, sc.plan_removal(sc.trace(result.model, X), {"0": [0]}))
    sc.push(result, tmp_path / "hub/net", figures={"latency in ms": (2.0, None)})
    assert sorted(p.name for p in (tmp_path / "hub/net").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "plan.json"
    ]  # fmt: skip
    again = sc.pull(tmp_path / "hub/net", build())
    assert equal(again, result.model)
    assert torch.equal(again(X), result.model(X))
    plans = json.loads((tmp_path / "hub/net/plan.json").read_text())
    assert [sc.PruningPlan.from_dict(plan) for plan in plans] == [result.plan]

    text = (tmp_path / "hub/net/README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "secateur", "tags": ["pruning"], "metrics": ["accuracy"]}
    before, after = (result.report[when] for when in ("before", "after"))
    count = [sum(p.numel() for p in net.parameters()) for net in (model, result.model)]
    assert f"| parameters | {count[0]:,} | {count[1]:,} |" in text
    assert f"| MACs | {before['macs']:,} | {after['macs']:,} |" in text
    assert f"| accuracy | {before['test']:.4g} | {after['test']:.4g} |" in text
    assert "| latency in ms | 2 | not measured |" in text
    assert "# net\n" in text
    assert "The cut was verified" in text

    sc.push(small, tmp_path / "hub/net", name="Twice")  # two plans, over what was there
    assert equal(sc.pull(tmp_path / "hub/net", build()), small)
    text = (tmp_path / "hub/net/README.md").read_text()
    assert f"| parameters | {count[0]:,} | {sum(p.numel() for p in small.parameters()):,} |" in text
    assert "# Twice\n" in text
    assert "`secateur.verify` compares the two" in text
    with pytest.raises(UsageError, match="pass model=, a freshly built, unpruned Sequential"):
        sc.pull(tmp_path / "hub/net")

    config = (tmp_path / "hub/net/config.json").read_text()
    (tmp_path / "hub/net/config.json").write_text(config.replace("Sequential", "Other"))
    with pytest.raises(CheckpointError, match="is not the one that model"):
        sc.pull(tmp_path / "hub/net", build())
    (tmp_path / "hub/net/plan.json").write_text(json.dumps(plans))
    with pytest.raises(CheckpointError, match="other plans"):
        sc.pull(tmp_path / "hub/net", build())
    (tmp_path / "hub/net/plan.json").unlink()
    with pytest.raises(UsageError, match="can't be read"):
        sc.pull(tmp_path / "hub/net", build())


@pytest.mark.slow
def test_no_library_is_imported_before_it_is_needed() -> None:
    code = "import sys, secateur; secateur.pull, secateur.push; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "secateur.integrations.hub" in loaded
    assert not set(loaded) & {"timm", "transformers", "lightning", "huggingface_hub"}


TIMM: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({"num_classes": 7, "in_chans": 1, "output_stride": 16}, 64),
    "mobilenetv3_small_050": ({"num_classes": 5, "drop_rate": 0.1}, 64),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_is_reloaded_by_one_call_and_by_timm(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    options, size = TIMM[name]
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    x = torch.randn(2, options.get("in_chans", 3), size, size)
    result = sc.prune(model, x, sc.Target(macs=0.4), method="l2")
    sc.push(result, tmp_path)
    again = sc.pull(tmp_path)
    assert type(again) is type(model)
    assert equal(again, result.model)
    assert torch.equal(again(x), result.model(x))

    # What timm's own code makes of the folder: the unpruned architecture; the pruned weights don't fit that.
    built = timm.create_model(f"local-dir:{tmp_path}")
    found, own = (json.dumps(timm.data.resolve_model_data_config(one)) for one in (again, built))
    assert found == own
    assert {n: v.shape for n, v in built.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}
    assert equal(sc.load(built, tmp_path / "model.safetensors"), result.model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)

    sc.push(again, tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["ResNet", "ConvNext", "ViT"])
def test_a_network_of_transformers_is_reloaded_by_one_call(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from huggingface_hub import ModelCard

    sizes: dict[str, dict[str, Any]] = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1]},
        "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        "ViT": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
                "image_size": 32, "patch_size": 8},
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, **sizes[kind])
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    result = sc.prune(model, inputs, sc.Target(channels=0.3), method="l1")
    sc.push(result, tmp_path)
    again = sc.pull(tmp_path)
    assert type(again) is type(model)
    assert equal(again, result.model)
    assert torch.equal(again(**inputs).logits, result.model(**inputs).logits)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == model.config.model_type
    loaded = ModelCard.load(tmp_path / "README.md")
    loaded.data.to_dict()
    assert loaded.data.library_name == "secateur"
    assert loaded.data.tags == ["pruning", "transformers"]
    with pytest.raises(RuntimeError):
        type(model).from_pretrained(tmp_path)

    half = sc.apply(model.half(), result.plan)
    sc.push(half, tmp_path / "half")
    assert sc.pull(tmp_path / "half").dtype == torch.float16


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "timm: a file": ({"architecture": "local-dir:/tmp/x"}, "no architecture of timm"),
    "timm: a repository": ({"architecture": "hf-hub:some/body"}, "no architecture of timm"),
    "timm: none": ({"architecture": ["resnet18"]}, "no architecture of timm"),
    "timm: weights": ({"model_args": {"checkpoint_path": "x.pth"}}, "checkpoint_path is no argument"),
    "timm: a download": ({"model_args": {"pretrained": True}}, "pretrained is no argument"),
    "timm: more": ({"model_args": {"pretrained_strict": False}}, "pretrained_strict is no argument"),
    "timm: unknown": ({"model_args": {"no_such_thing": 1}}, "no resnet18 can be built"),
    "code of the folder": ({"model_type": "resnet", "auto_map": {"AutoModel": "m.Net"}}, "auto_map can name code"),
    "a kernel": ({"model_type": "vit", "attn_implementation": "some/body"}, "attn_implementation can name code"),
    "within": ({"model_type": "detr", "backbone_config": {"auto_map": {}}}, "auto_map can name code"),
    "a backbone": ({"model_type": "detr", "backbone": "some/body"}, "names a network elsewhere"),
    "timm in it": ({"model_type": "timm_backbone", "backbone": "hf-hub:some/body"}, "no architecture of timm"),
    "no kind": ({"model_type": "nothing"}, "is none of transformers"),
    "no class": ({"model_type": "resnet", "architectures": ["pipeline"]}, "is no one resnet model"),
    "a class of another kind": ({"model_type": "resnet", "architectures": ["ViTModel"]}, "is no one resnet model"),
    "no value": (
        {"model_type": "resnet", "architectures": ["ResNetModel"], "hidden_act": "x"}, "no ResNetModel can be built"
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_configuration_that_names_anything_else_is_refused(name: str) -> None:
    library = "transformers" if "model_type" in FOREIGN[name][0] else "timm"
    pytest.importorskip(library)
    changed, message = FOREIGN[name]
    whole = {} if library == "transformers" else {"architecture": "resnet18", "model_args": {}, "pretrained_cfg": {}}
    build = import_module(f"secateur.integrations.{library}").build
    with pytest.raises(CheckpointError, match=message) as error:
        build({**whole, **changed}, "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_could_not_be_pulled_is_not_pushed(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    class Norm(nn.BatchNorm2d):
        pass

    odd = timm.create_model("resnet18", norm_layer=Norm).eval()
    with pytest.raises(UsageError, match="norm_layer"):
        sc.push(odd, tmp_path / "odd")
    changed = timm.create_model("resnet18").eval()
    changed.layer1[0].conv1 = nn.Conv2d(64, 64, 5, padding=2)
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1"):
        sc.push(changed, tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
