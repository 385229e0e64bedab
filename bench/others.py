"""Networks of further libraries for the zoo sweep: detectors, segmentation, restoration, local features, audio.

None of these libraries is needed by Secateur, and those that are not installed are left out of a sweep:
``pip install ultralytics segmentation-models-pytorch monai kornia transformers basicsr``. Networks have random weights,
and most are of reduced size.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], nn.Module]


def _yolo(config: str) -> Build:
    def build() -> nn.Module:
        from ultralytics.nn import tasks

        kinds = {"-cls": "ClassificationModel", "-seg": "SegmentationModel", "-pose": "PoseModel", "-obb": "OBBModel",
                 "rtdetr": "RTDETRDetectionModel"}  # fmt: skip
        kind = next((kind for part, kind in kinds.items() if part in config), "DetectionModel")
        return getattr(tasks, kind)(f"{config}.yaml", verbose=False)

    return build


def _of(module: str, name: str, *values: Any, **options: Any) -> Build:
    def build() -> nn.Module:
        if module.startswith("basicsr"):  # it imports a module of torchvision by an old name
            from torchvision.transforms import functional

            sys.modules.setdefault("torchvision.transforms.functional_tensor", functional)
        return getattr(importlib.import_module(module), name)(*values, **options)

    return build


def _segmentation(name: str, encoder: str) -> Build:
    return _of("segmentation_models_pytorch", name, encoder_name=encoder, encoder_weights=None, classes=3)


def _transformers(name: str, config: str, **options: Any) -> Build:
    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, name)(getattr(library, config)(**options))

    return build


def _tensor(*shape: int) -> Callable[[nn.Module], Tensor]:
    return lambda model: torch.randn(*shape)


def _keyword(name: str, *shape: int) -> Callable[[nn.Module], dict[str, Tensor]]:
    return lambda model: {name: torch.randn(*shape)}


YOLO = """
    yolov3-tiny yolov5n yolov6n yolov8n yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov9t yolov10n yolo11n
    yolo12n rtdetr-l
""".split()  # noqa: SIM905 - so many names read better so
SEGMENTATION = [
    *((name, "resnet18") for name in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3",
                                      "DeepLabV3Plus", "UPerNet")),
    ("Unet", "mobilenet_v2"), ("Unet", "efficientnet-b0"), ("Unet", "xception"), ("Unet", "dpn68"),
    ("FPN", "densenet121"), ("Segformer", "mit_b0"),
]  # fmt: skip
PIXELS = _keyword("pixel_values", 1, 3, 64, 64)
SMALL = _tensor(1, 1, 32, 32)

OTHERS: dict[str, tuple[Build, Callable[[nn.Module], Any]]] = {
    **{f"ultralytics/{name}": (_yolo(name), _tensor(1, 3, 128, 128)) for name in YOLO},
    **{
        f"segmentation_models_pytorch/{name}-{encoder}": (_segmentation(name, encoder), _tensor(1, 3, 64, 64))
        for name, encoder in SEGMENTATION
    },
    "transformers/resnet": (_transformers("ResNetForImageClassification", "ResNetConfig"), PIXELS),
    "transformers/regnet": (_transformers("RegNetForImageClassification", "RegNetConfig"), PIXELS),
    "transformers/mobilenet_v1": (_transformers("MobileNetV1ForImageClassification", "MobileNetV1Config"), PIXELS),
    "transformers/mobilenet_v2": (_transformers("MobileNetV2ForImageClassification", "MobileNetV2Config"), PIXELS),
    "transformers/efficientnet": (_transformers("EfficientNetForImageClassification", "EfficientNetConfig"), PIXELS),
    "transformers/mobilevit": (_transformers("MobileViTForImageClassification", "MobileViTConfig"), PIXELS),
    "transformers/convnext": (_transformers("ConvNextForImageClassification", "ConvNextConfig"), PIXELS),
    "transformers/upernet": (_transformers("UperNetForSemanticSegmentation", "UperNetConfig"), PIXELS),
    "transformers/wav2vec2": (
        _transformers("Wav2Vec2ForCTC", "Wav2Vec2Config", hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=64, conv_dim=(32,) * 7),
        _keyword("input_values", 1, 4000),
    ),
    "monai/UNet": (_of("monai.networks.nets", "UNet", 2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), SMALL),
    "monai/UNet-3d": (
        _of("monai.networks.nets", "UNet", 3, 1, 2, (8, 16, 32), (2, 2)), _tensor(1, 1, 16, 16, 16)
    ),
    "monai/BasicUNet": (_of("monai.networks.nets", "BasicUNet", 2, 1, 2, features=(8, 8, 16, 32, 64, 8)), SMALL),
    "monai/SegResNet": (_of("monai.networks.nets", "SegResNet", 2, 8, 1, 2), SMALL),
    "monai/DynUNet": (
        _of("monai.networks.nets", "DynUNet", 2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32]), SMALL
    ),
    "monai/VNet": (_of("monai.networks.nets", "VNet", 3, 1, 2), _tensor(1, 1, 16, 16, 16)),
    "monai/AttentionUnet": (_of("monai.networks.nets", "AttentionUnet", 2, 1, 2, (8, 16, 32), (2, 2)), SMALL),
    "monai/HighResNet": (_of("monai.networks.nets", "HighResNet", 2, 1, 2), SMALL),
    "kornia/HardNet": (_of("kornia.feature", "HardNet", False), _tensor(2, 1, 32, 32)),
    "kornia/SOSNet": (_of("kornia.feature", "SOSNet", False), _tensor(2, 1, 32, 32)),
    "kornia/KeyNet": (_of("kornia.feature", "KeyNet", False), SMALL),
    "basicsr/RRDBNet": (
        _of("basicsr.archs.rrdbnet_arch", "RRDBNet", num_in_ch=3, num_out_ch=3, num_feat=16, num_block=2,
            num_grow_ch=8), _tensor(1, 3, 16, 16),
    ),
    "basicsr/SRVGGNetCompact": (
        _of("basicsr.archs.srvgg_arch", "SRVGGNetCompact", num_in_ch=3, num_out_ch=3, num_feat=16, num_conv=3),
        _tensor(1, 3, 16, 16),
    ),
    "basicsr/EDSR": (
        _of("basicsr.archs.edsr_arch", "EDSR", num_in_ch=3, num_out_ch=3, num_feat=16, num_block=2),
        _tensor(1, 3, 16, 16),
    ),
}  # fmt: skip
"""``library/network`` -> how it is built, what it is fed."""
