"""Backbones of torchvision and timm by name."""

from __future__ import annotations

import importlib

import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from dn_detr.conversion.backbone_weights import Normalisation, check_normalisation
from dn_detr.errors import InputError

STAGES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
"""Stride -> name of the feature in Detectron2's ResNet."""

PROBE = (128, 192)
"""Height and width of the image that reveals the strides of features; no two sides are equal."""


class NamedBackbone(Backbone):
    """Backbone of a library with the feature names of Detectron2's ResNet.

    Args:
        stages: Maps images [B, 3, H, W] to a list of feature maps, channels first or last, one for
            each of its `parts`.
        freeze_at: Parts up to the feature "res<freeze_at>" are frozen; 0 freezes none.
        name: "<library>/<name>".
    """

    def __init__(self, stages: nn.Module, freeze_at: int, name: str = ""):
        super().__init__()
        self.stages = stages
        self.name = name
        self.place: dict[str, int] = {}
        self.is_channels_last: dict[str, bool] = {}
        self._out_feature_channels, self._out_feature_strides = {}, {}
        try:
            with torch.no_grad():
                outputs = stages.eval()(torch.zeros(1, 3, *PROBE))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{name} is no backbone for images of any size: it fails on {PROBE[0]} x "
                f"{PROBE[1]} pixels ({_one_line(error)})"
            ) from error
        stages.train()
        for index, output in enumerate(outputs):
            for stride, name in STAGES.items():
                cells = tuple(size // stride for size in PROBE)
                is_last = tuple(output.shape[1:3]) == cells
                if is_last or tuple(output.shape[2:]) == cells:
                    self.place[name] = index
                    self.is_channels_last[name] = is_last
                    self._out_feature_channels[name] = output.shape[-1 if is_last else 1]
                    self._out_feature_strides[name] = stride
        self._out_features = list(self.place)
        if not self.place:
            raise ValueError("the backbone has no features of stride 4, 8, 16 or 32")
        if freeze_at:
            if not stages.parts:
                raise ValueError(
                    f"MODEL.BACKBONE.FREEZE_AT must be 0 for backbones of timm, got {freeze_at}"
                )
            last = self.place.get(f"res{freeze_at}")
            if last is None:
                raise ValueError(
                    f"MODEL.BACKBONE.FREEZE_AT must be 0 or the number of a feature of the "
                    f"backbone {self._out_features}, got {freeze_at}"
                )
            stages.parts[: last + 1].requires_grad_(False)

    def library_names(self) -> dict[str, str]:
        """Return parameter name in the library's files -> name here, "" for the classifier's."""
        return {
            theirs: ours and f"stages.{ours}"
            for theirs, ours in self.stages.library_names().items()
        }

    @property
    def normalisation(self) -> Normalisation:
        """Pixel normalisation that the library's weights were trained with."""
        return self.stages.normalisation

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this."""
        return 32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images [B, 3, H, W] to features {"res2": [B, C, H / 4, W / 4], ..., "res5": ...}."""
        outputs = self.stages(images)
        features = {}
        for name, index in self.place.items():
            feature = outputs[index]
            if self.is_channels_last[name]:
                feature = feature.permute(0, 3, 1, 2).contiguous()
            features[name] = feature
        return features


class TorchvisionStages(nn.Module):
    """The layers of a torchvision classifier before its pooling.

    Args:
        name: Name of the model in torchvision.
        is_pretrained: Whether to load torchvision's weights.
    """

    def __init__(self, name: str, is_pretrained: bool):
        super().__init__()
        models = importlib.import_module("torchvision.models")
        if name not in models.list_models(models):
            raise ValueError(f"torchvision has no model {name!r}")
        classifier = models.get_model(name, weights="DEFAULT" if is_pretrained else None)
        trunk = getattr(classifier, "features", None)
        if trunk is None:
            children = list(classifier.named_children())
            names = [child for child, _ in children]
            if "avgpool" not in names:
                raise ValueError(f"torchvision's {name} has no pooling after a sequence of stages")
            names = names[: names.index("avgpool")]
            trunk = {child: getattr(classifier, child) for child in names}
            prefixes = {child: f"parts.{index}" for index, child in enumerate(trunk)}
        else:
            trunk = dict(trunk.named_children())
            prefixes = {f"features.{child}": f"parts.{index}" for index, child in enumerate(trunk)}
        self.parts = nn.ModuleList(trunk.values())
        self.names = {key: _rename(key, prefixes) for key in classifier.state_dict()}
        transforms = models.get_model_weights(name).DEFAULT.transforms()
        self.normalisation = _normalisation(transforms.mean, transforms.std)

    def library_names(self) -> dict[str, str]:
        """Return name in the classifier -> name here, "" for parameters after the pooling."""
        return self.names

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images [B, 3, H, W] to the output of each part, [B, C, h, w] or [B, h, w, C]."""
        outputs = []
        for part in self.parts:
            images = part(images)
            outputs.append(images)
        return outputs


class TimmStages(nn.Module):
    """timm's feature extractor of a model.

    Args:
        name: Name of the model in timm.
        is_pretrained: Whether to load timm's weights.
    """

    def __init__(self, name: str, is_pretrained: bool):
        super().__init__()
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise ValueError(f"the backbone timm/{name} needs timm: pip install timm") from error
        self.parts = nn.ModuleList()
        if ":" in name:  # timm would fetch what hf-hub:... names, or read it from a folder
            raise ValueError(f"timm has no model {name!r}")
        options = {"pretrained": is_pretrained, "features_only": True}
        try:
            try:  # windowed transformers accept only one image size by default
                self.model = timm.create_model(name, strict_img_size=False, **options)
            except TypeError as error:
                if "strict_img_size" not in str(error):
                    raise
                self.model = timm.create_model(name, **options)
        except RuntimeError as error:
            raise ValueError(f"timm cannot build {name!r}: {_one_line(error)}") from error
        self.name = name
        self.normalisation = _normalisation(
            self.model.default_cfg["mean"], self.model.default_cfg["std"]
        )

    def library_names(self) -> dict[str, str]:
        """Return name in timm's model -> name here, "" for the classifier's.

        Feature extractors join the names of nested modules by "_".
        """
        with torch.device("meta"):
            whole = importlib.import_module("timm").create_model(self.name)
        own = {key.removeprefix("model.").replace(".", "_"): key for key in self.model.state_dict()}
        return {
            key: f"model.{own[flat]}" if (flat := key.replace(".", "_")) in own else ""
            for key in whole.state_dict()
        }

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images [B, 3, H, W] to feature maps [B, C, h, w] or [B, h, w, C]."""
        return self.model(images)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _rename(key: str, prefixes: dict[str, str]) -> str:
    """Replace the prefix of a name by that of its part; "" if no part has it."""
    for child, part in prefixes.items():
        if key.startswith(f"{child}."):
            return part + key.removeprefix(child)
    return ""


def _normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> Normalisation:
    return "RGB", tuple(255 * value for value in mean), tuple(255 * value for value in std)


class FrozenNormAct(FrozenBatchNorm2d):
    """Frozen batch norm with the dropout and activation of timm's BatchNormAct2d."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__(norm.num_features, norm.eps)
        frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(self, name).copy_(getattr(frozen, name))
        self.drop, self.act = norm.drop, norm.act

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to the same shape."""
        return self.act(self.drop(super().forward(x)))


def freeze_norms(module: nn.Module) -> None:
    """Freeze all batch norms inside `module`, and keep the activations in those of timm."""
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)) and hasattr(child, "act"):
            setattr(module, name, FrozenNormAct(child))
        elif isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            setattr(module, name, FrozenBatchNorm2d.convert_frozen_batchnorm(child))
        else:
            freeze_norms(child)


LIBRARIES = {"torchvision": TorchvisionStages, "timm": TimmStages}


@BACKBONE_REGISTRY.register()
def build_named_backbone(cfg, input_shape: ShapeSpec) -> NamedBackbone:  # noqa: ARG001
    """Build MODEL.DN_DETR.BACKBONE, "<library>/<name>".

    MODEL.RESNETS.NORM "FrozenBN" freezes its batch norms. MODEL.DN_DETR.BACKBONE_PRETRAINED loads
    the library's weights if MODEL.WEIGHTS is empty. MODEL.BACKBONE.FREEZE_AT is read as well.
    """
    node = cfg.MODEL.DN_DETR
    library, _, name = node.BACKBONE.partition("/")
    if library not in LIBRARIES or not name:
        raise ValueError(
            f'MODEL.DN_DETR.BACKBONE must be "<library>/<name>" with a library of '
            f"{sorted(LIBRARIES)}, got {node.BACKBONE!r}"
        )
    is_pretrained = node.BACKBONE_PRETRAINED and not cfg.MODEL.WEIGHTS
    try:
        stages = LIBRARIES[library](name, is_pretrained)
    except OSError as error:  # raised by urllib and timm's hub
        raise InputError(
            f"{library} cannot fetch its weights of {name} ({_one_line(error)}): copy the file to "
            "this machine and set MODEL.WEIGHTS to its path, or "
            "MODEL.DN_DETR.BACKBONE_PRETRAINED False to start from random weights."
        ) from error
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        freeze_norms(stages)
    backbone = NamedBackbone(stages, cfg.MODEL.BACKBONE.FREEZE_AT, node.BACKBONE)
    if is_pretrained:
        given = (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        check_normalisation(f"the weights of {node.BACKBONE}", backbone.normalisation, given)
    return backbone
