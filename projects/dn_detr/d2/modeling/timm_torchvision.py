"""Backbones of torchvision and timm by name."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence

import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from dn_detr.conversion.backbone_weights import Normalisation, check_normalisation
from dn_detr.d2.modeling.feature_names import check_features
from dn_detr.errors import InputError

STAGES = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}
"""Stride -> name of the feature in Detectron2's ResNet."""

PATCH = 16
"""Side of the patches of plain vision transformers, in pixels."""

NO_WINDOWS = (
    "MODEL.DN_DETR.BACKBONE_WINDOW must be 0, or positive for a plain vision transformer of timm "
    "with absolute positions; the backbone is {}"
)

PROBE = (128, 192)
"""Height and width of the image that reveals the strides of features; no two sides are equal."""


class NamedBackbone(Backbone):
    """Backbone of a library with the feature names of Detectron2's ResNet.

    A plain vision transformer has one feature map, of stride 16; a simple feature pyramid makes
    the others from it (ViTDet, 2203.16527, section 3; the neck of the detector projects them).

    Args:
        stages: Maps images [B, 3, H, W] to a list of feature maps, channels first or last, one for
            each of its `parts`.
        freeze_at: Parts up to the feature "res<freeze_at>" are frozen; 0 freezes none.
        name: "<library>/<name>".
        in_features: Features that the detector reads, of which a pyramid makes no others.
    """

    def __init__(
        self, stages: nn.Module, freeze_at: int, name: str = "", in_features: Sequence[str] = ()
    ):
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
        self.pyramid = nn.ModuleDict()
        if list(self.place) == ["res4"]:
            width = self._out_feature_channels["res4"]
            levels = pyramid_levels(width)
            check_features("MODEL.DN_DETR.IN_FEATURES", in_features, levels)
            for name in in_features:
                self.pyramid[name], channels = levels[name]
                self._out_feature_channels[name] = channels
            self._out_feature_strides.update((name, stride) for stride, name in STAGES.items())
        self._out_features = list(self.pyramid or self.place)
        if not self.place:
            raise ValueError(
                f"{self.name} has no features of stride 4, 8, 16 or 32, without rounding"
            )
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
        if self.pyramid:
            return {name: level(features["res4"]) for name, level in self.pyramid.items()}
        return features


def pyramid_levels(width: int) -> dict[str, tuple[nn.Module, int]]:
    """Make the levels of a simple feature pyramid on features [B, width, H / 16, W / 16].

    Returns:
        Feature name -> module and its number of channels.
    """

    def double(channels: int) -> nn.Module:
        return nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)

    norm = get_norm("LN", width // 2)
    res2 = nn.Sequential(double(width), norm, nn.GELU(), double(width // 2))
    return {
        "res2": (res2, width // 4),
        "res3": (double(width), width // 2),
        "res4": (nn.Identity(), width),
        "res5": (nn.MaxPool2d(2), width),
    }


class TorchvisionStages(nn.Module):
    """The layers of a torchvision classifier before its pooling.

    Args:
        name: Name of the model in torchvision.
        is_pretrained: Whether to load torchvision's weights.
        window: Must be 0.
    """

    def __init__(self, name: str, is_pretrained: bool, window: int = 0):
        super().__init__()
        if window:
            raise ValueError(NO_WINDOWS.format(name))
        models = importlib.import_module("torchvision.models")
        if name not in models.list_models(models):
            raise ValueError(f"torchvision has no model {name!r}")
        classifier = models.get_model(name, weights="DEFAULT" if is_pretrained else None)
        trunk = dict(_trunk(classifier))
        prefixes = {child: f"parts.{index}" for index, child in enumerate(trunk)}
        self.parts = nn.ModuleList(trunk.values())
        self.names = {key: _rename(key, prefixes) for key in classifier.state_dict()}
        transforms = models.get_model_weights(name).DEFAULT.transforms()
        mean, std = transforms.mean, transforms.std
        if hasattr(classifier, "transform_input"):  # which its forward does after these
            mean = std = (0.5, 0.5, 0.5)
        self.normalisation = _normalisation(mean, std)

    def library_names(self) -> dict[str, str]:
        """Return name in the classifier -> name here, "" for parameters after the pooling."""
        return self.names

    def library_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters of a file as they are."""
        return state

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images [B, 3, H, W] to the output of each part, [B, C, h, w] or [B, h, w, C]."""
        outputs = []
        for part in self.parts:
            images = part(images)
            outputs.append(images)
        return outputs


def _trunk(classifier: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules of a torchvision classifier up to its pooling, in order.

    Sequences with named members (the stages of RegNet) are taken apart, those with numbered members
    (the blocks of a stage) are not.
    """
    for name, child in classifier.named_children():
        if name in ("avgpool", "fc", "classifier"):
            return
        is_trunk = not prefix and name in ("features", "layers")
        has_names = type(child) is nn.Sequential and not hasattr(child, "0")
        if is_trunk or has_names:
            yield from _trunk(child, f"{prefix}{name}.")
        elif not name.startswith("aux"):
            yield f"{prefix}{name}", child


class TimmStages(nn.Module):
    """timm's feature extractor of a model.

    Plain vision transformers get patches of 16 pixels and images of any size: timm resamples patch
    and position embeddings. Their feature map is the normalized output of the last block. With
    windows, most blocks attend within windows of the map, and the last one of each quarter of the
    blocks to all of it (2203.16527, section 3); prefix tokens go through every window, and are
    averaged.

    Args:
        name: Name of the model in timm.
        is_pretrained: Whether to load timm's weights.
        window: Side of the windows in patches; 0: none.
    """

    def __init__(self, name: str, is_pretrained: bool, window: int = 0):
        super().__init__()
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise ValueError(f"the backbone timm/{name} needs timm: pip install timm") from error
        self.parts = nn.ModuleList()
        if ":" in name:  # timm would fetch what hf-hub:... names, or read it from a folder
            raise ValueError(f"timm has no model {name!r}")
        try:
            self.model, self.is_plain = _create(timm, name, is_pretrained)
        except RuntimeError as error:
            raise ValueError(f"timm cannot build {name!r}: {_one_line(error)}") from error
        self.name = name
        self.window, self.grid = window, (0, 0)
        if self.is_plain:
            self.model.prune_intermediate_layers(1)
        if window:
            if window < 0 or not self.is_plain or getattr(self.model, "rope", None) is not None:
                raise ValueError(NO_WINDOWS.format(name))
            blocks = self.model.blocks
            is_global = {len(blocks) * quarter // 4 - 1 for quarter in (1, 2, 3, 4)}
            for index in set(range(len(blocks))) - is_global:
                blocks[index].register_forward_pre_hook(self._into_windows)
                blocks[index].register_forward_hook(self._out_of_windows)
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
        if not self.is_plain:
            return self.model(images)
        if torch.compiler.is_exporting():  # the graph would keep the size of its example
            raise InputError(f"{self.name} resamples its positions, which cannot be exported yet.")
        self.grid = images.shape[2] // PATCH, images.shape[3] // PATCH
        options = {"norm": True, "output_fmt": "NCHW", "intermediates_only": True}
        return self.model.forward_intermediates(images, indices=1, **options)

    def library_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resample patch and position embeddings in a file of timm or of the authors of a plain
        vision transformer to the sizes of this one; other files stay as they are.
        """
        if not self.is_plain or not any("patch_embed.proj.weight" in name for name in state):
            return state
        library = importlib.import_module(type(self.model).__module__)
        try:
            return library.checkpoint_filter_fn(dict(state), self.model)
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(
                f"the embeddings in this file cannot be resampled to those of {self.name}: "
                f"{_one_line(error)}."
            ) from error

    def _into_windows(self, block: nn.Module, args: tuple) -> tuple:  # noqa: ARG002
        """Cut tokens [B, P + h * w, C] into N windows of each image [B * N, P + window ** 2, C],
        padded by zeros.
        """
        prefix, tokens = args[0].split([self.model.num_prefix_tokens, math.prod(self.grid)], 1)
        size, (height, width) = self.window, self.grid
        tokens = tokens.unflatten(1, (height, width))
        tokens = nn.functional.pad(tokens, (0, 0, 0, -width % size, 0, -height % size))
        rows, columns = -(-height // size), -(-width // size)
        windows = tokens.unflatten(2, (columns, size)).unflatten(1, (rows, size)).transpose(2, 3)
        windows = windows.reshape(-1, size * size, tokens.shape[-1])
        return (torch.cat([prefix.repeat_interleave(rows * columns, 0), windows], 1), *args[1:])

    def _out_of_windows(self, block: nn.Module, args: tuple, out: Tensor) -> Tensor:  # noqa: ARG002
        """Undo `_into_windows`."""
        size, (height, width) = self.window, self.grid
        rows, columns = -(-height // size), -(-width // size)
        prefix, windows = out.split([self.model.num_prefix_tokens, size * size], 1)
        tokens = windows.unflatten(0, (-1, rows, columns)).unflatten(3, (size, size))
        tokens = tokens.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
        prefix = prefix.unflatten(0, (-1, rows * columns)).mean(1)
        return torch.cat([prefix, tokens.flatten(1, 2)], 1)


def _create(timm, name: str, is_pretrained: bool) -> tuple[nn.Module, bool]:
    """Build a model of timm for images of any size: as a windowed vision transformer, as a plain
    one, or as any other network, whichever takes the options; and whether it is a plain one.
    """
    features = {"features_only": True}
    plain = {"dynamic_img_size": True, "patch_size": PATCH, "num_classes": 0}
    refused = None
    for options in ({"strict_img_size": False, **features}, plain, features):
        try:
            return timm.create_model(name, pretrained=is_pretrained, **options), options is plain
        except (AssertionError, TypeError) as error:
            refused = error
    raise RuntimeError(str(refused))


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
        stages = LIBRARIES[library](name, is_pretrained, node.BACKBONE_WINDOW)
    except OSError as error:  # raised by urllib and timm's hub
        raise InputError(
            f"{library} cannot fetch its weights of {name} ({_one_line(error)}): copy the file to "
            "this machine and set MODEL.WEIGHTS to its path, or "
            "MODEL.DN_DETR.BACKBONE_PRETRAINED False to start from random weights."
        ) from error
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        freeze_norms(stages)
    backbone = NamedBackbone(
        stages, cfg.MODEL.BACKBONE.FREEZE_AT, node.BACKBONE, in_features=node.IN_FEATURES
    )
    if is_pretrained:
        given = (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        check_normalisation(f"the weights of {node.BACKBONE}", backbone.normalisation, given)
    return backbone
