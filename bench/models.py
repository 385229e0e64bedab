"""The networks of the zoo sweep: how each is built, what it is fed, which layers give its output."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

CLASSES = 1000
HEADS = re.compile(
    r"(cls_logits|bbox_reg|bbox_pred|cls_score|bbox_ctrness|mask_fcn_logits|kps_score_lowres)(\.\d+)*$"
    r"|head\.(classification|regression)_head\.module_list(\.\d+)+$"
)
"""Names of the layers that give a torchvision detector's outputs."""

TIMM = """
resnet18 resnet26d resnet50 resnet50d resnet50_gn resnet33ts resnetaa50 resnetblur50 resnetrs50 seresnet50 seresnext50_32x4d
ecaresnet26t ecaresnet50d ecaresnetlight resnext50_32x4d wide_resnet50_2 legacy_seresnet18 legacy_seresnext26_32x4d
res2net50_26w_4s res2net50d res2next50 resnest14d resnest26d resnest50d resnest50d_1s4x24d skresnet18 skresnet34
resnetv2_50 resnetv2_50d_gn resnetv2_50x1_bit gcresnet33ts gernet_s repvgg_a0 repvgg_b1g4 mobileone_s0 mobileone_s4
botnet26t_256 halonet26t lambda_resnet26t bat_resnext26ts eca_botnext26ts_256
dpn48b dpn68 dpn92 dla34 dla46_c dla60 dla60x dla60_res2net hrnet_w18_small hrnet_w18_small_v2
cspresnet50 cspresnext50 cspdarknet53 cs3darknet_s cs3darknet_focus_s cs3sedarknet_l darknet53
ghostnet_050 ghostnet_100 ghostnetv2_100 ghostnetv3_050 repghostnet_050
mobilenetv1_100 mobilenetv2_050 mobilenetv2_100 mobilenetv3_small_050 mobilenetv3_large_100 mobilenetv4_conv_small
mobilenetv4_conv_medium mobilenetv4_conv_blur_medium mobilenetv4_hybrid_medium lcnet_050 lcnetv2_small fbnetc_100
fbnetv3_b mnasnet_100 mixnet_s semnasnet_075 spnasnet_100 hardcorenas_a tinynet_e rexnet_100 rexnetr_130
efficientnet_b0 efficientnet_b1 efficientnet_es efficientnet_lite0 efficientnet_b0_gn efficientnet_cc_b0_4e tf_efficientnet_b0
efficientnetv2_rw_t efficientnetv2_s tf_efficientnetv2_b0 gc_efficientnetv2_rw_t
regnetx_002 regnety_002 regnety_008 regnetz_005 regnetv_040 regnetz_b16
convnext_atto convnext_pico convnext_tiny convnextv2_atto convnextv2_nano convnext_atto_rms inception_next_atto
nfnet_l0 eca_nfnet_l0 dm_nfnet_f0 nf_regnet_b1 nf_resnet50 densenet121 densenetblur121d
vgg11_bn vgg16 xception41 legacy_xception inception_v3 inception_v4 inception_resnet_v2 selecsls42b tresnet_m
vovnet39a ese_vovnet19b_dw eca_vovnet39b hgnet_tiny hgnetv2_b0 rdnet_tiny fasternet_t0 starnet_s1 repvit_m0_9
levit_128s levit_conv_128s edgenext_xx_small edgenext_small fastvit_t8 fastvit_sa12 mobilevit_xxs mobilevitv2_050
efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_l1 efficientvit_m0 swiftformer_xs convmixer_768_32
mixer_s32_224 resmlp_12_224 gmlp_ti16_224 gmixer_12_224 poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18
vit_tiny_patch16_224 vit_small_patch32_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 beit_base_patch16_224
cait_xxs24_224 pit_ti_224 convit_tiny tnt_s_patch16_224 visformer_tiny volo_d1_224 crossvit_9_240 coat_tiny coat_lite_tiny
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 maxvit_nano_rw_256 coatnet_nano_rw_224
xcit_nano_12_p16_224 davit_tiny twins_svt_small pvt_v2_b0 focalnet_tiny_srf gcvit_xxtiny nest_tiny mvitv2_tiny
tiny_vit_5m_224 mambaout_femto sequencer2d_s hiera_tiny_224 nextvit_small vit_relpos_small_patch16_224 vitamin_small_224
""".split()  # fmt: skip  # one name a family member, in the families' own order
"""A broad sample over timm's families."""


@dataclass(frozen=True)
class Entry:
    """One network of the sweep."""

    name: str
    """``library/kind/model``."""
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Any]


def image(size: int) -> Callable[[nn.Module], Any]:
    """Return a maker of one image."""
    return lambda model: torch.randn(1, 3, size, size)


def clip(frames: int, size: int) -> Callable[[nn.Module], Any]:
    """Return a maker of one video clip."""
    return lambda model: torch.randn(1, 3, frames, size, size)


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import get_model

        if name in ("googlenet", "inception_v3"):
            return get_model(name, weights=None, init_weights=False)
        return get_model(name, weights=None, **options)

    return build


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return build


def _timm_image(model: Any) -> Any:
    """Feed the model's own size where it is fixed, and 128 pixels (96 where that divides better) otherwise."""
    config = model.pretrained_cfg
    size = int(config["input_size"][-1])
    fixed = bool(config.get("fixed_input_size")) or hasattr(model, "pos_embed")
    least = int((config.get("min_input_size") or (3, 128, 128))[-1])
    return torch.randn(1, 3, *([size] * 2 if fixed else [min(size, max(128, least))] * 2))


def entries() -> list[Entry]:
    """List all networks of the sweep."""
    from torchvision import models

    found = []
    for name in models.list_models(module=models):
        found.append(Entry(f"torchvision/classification/{name}", _torchvision(name),
                           image(299 if name == "inception_v3" else 256 if "swin_v2" in name else 224)))  # fmt: skip
    for name in models.list_models(module=models.segmentation):
        found.append(
            Entry(f"torchvision/segmentation/{name}", _torchvision(name, weights_backbone=None), image(128))
        )
    for name in models.list_models(module=models.detection):
        options: dict[str, Any] = {"weights_backbone": None}
        if not name.startswith("ssd"):
            options |= {"min_size": 256, "max_size": 256}
        size = 320 if "320" in name else 300 if name.startswith("ssd") else 256
        found.append(
            Entry(
                f"torchvision/detection/{name}",
                _torchvision(name, **options),
                lambda model, size=size: ([torch.rand(3, size, size)],),
            )
        )
    for name in models.list_models(module=models.video):
        maker = clip(16, 224) if name.startswith(("mvit", "s3d")) else clip(8, 112)
        found.append(Entry(f"torchvision/video/{name}", _torchvision(name), maker))
    found += [Entry(f"timm/{name}", _timm(name), _timm_image) for name in TIMM]
    return found


def output_layers(model: nn.Module) -> list[str]:
    """Name the layers that give the output: those as wide as the classes, and detectors' heads by name."""
    widths = {CLASSES, int(getattr(model, "num_classes", CLASSES) or CLASSES), 400, 21}
    found = []
    for name, module in model.named_modules():
        width = getattr(module, "out_features", getattr(module, "out_channels", None))
        last = name.rpartition(".")[0].rpartition(".")[2] in ("classifier", "aux_classifier", "head", "heads", "fc", "")
        last = last or name.rpartition(".")[2] in ("fc", "head", "classifier", "last_linear", "linear", "head_dist", "l")
        if isinstance(width, int) and width in widths and (last or width == CLASSES):
            found.append(name)
        elif isinstance(width, int) and HEADS.search(name):
            found.append(name)
    return found
