"""What it takes to run the authors' code on a CPU with today's libraries, and to compare."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from pathlib import Path
from unittest import mock

import torch
import torchvision
from torch import nn

from dn_detr.layers import box_ops
from dn_detr.losses import loss_terms
from dn_detr.structures import Target, pad_targets

THEIR_PACKAGES = (
    "models",
    "util",
    "datasets",
    "main",
    "engine",
    "train_net",
    "detrex",
    "modeling",
    "mask2former",
    "maskdino",
)
NOT_INSTALLED = (
    "timm",
    "wandb",
    "fairscale",
    "cv2",
    "einops",
    "panopticapi",
    "termcolor",
    "addict",
    "yapf",
    "mmcv",
    "mmdet",
    "MultiScaleDeformableAttention",
    "calflops",
    "faster_coco_eval",
    "tensorboard",
    "transformers",
)


class Absent(types.ModuleType):
    """Stands for a library that is imported, but not needed for what is compared."""

    __version__ = "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


class AbsentFinder:
    """Finds the libraries of NOT_INSTALLED that nobody else finds, and all that lies below."""

    def find_spec(self, name, _path=None, _target=None):
        if name.split(".")[0] not in NOT_INSTALLED:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        pass


NUM_POINTS = 48
"""Points of a mask loss, of conftest's `fixed_points`."""

ADD_TO_AREAS = ("DAB-DETR", "DN-DETR", "DINO", "MaskDINO")
"""Repositories whose generalized IoU adds 1e-6 to the areas that it divides by."""


def add_to_areas(monkeypatch):
    """Let the losses of ours do so too; ours only bounds the areas from below."""

    def generalized_iou(a, b):
        intersection, union, hull = box_ops.overlaps(a, b)
        return intersection / (union + 1e-6) - (hull - union) / (hull + 1e-6)

    monkeypatch.setattr(loss_terms, "elementwise_generalized_iou", generalized_iou)


def open_checkout(path: Path, monkeypatch):
    """A function that imports a module of the checkout at `path`; it ends with the test.

    Calls that ask for CUDA stay on the CPU.
    """
    if path.name in ADD_TO_AREAS:
        add_to_areas(monkeypatch)
    monkeypatch.syspath_prepend(str(path))
    for name in list(sys.modules):
        if name.split(".")[0] in THEIR_PACKAGES:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, AbsentFinder()])
    monkeypatch.setattr(torchvision, "__version__", "0.9.0")  # some read "0.26" as 0.2
    monkeypatch.setattr(nn.modules.linear, "_LinearWithBias", nn.Linear, raising=False)
    monkeypatch.setitem(sys.modules, "torch._overrides", torch.overrides)
    monkeypatch.setitem(sys.modules, "detrex._C", Absent("detrex._C"))
    if importlib.util.find_spec("detectron2"):  # detrex registers its datasets whenever imported
        catalog = importlib.import_module("detectron2.data").DatasetCatalog
        monkeypatch.setattr(type(catalog), "register", lambda *_args: None)
        registry = importlib.import_module("fvcore.common.registry").Registry

        def register_anew(self, name, module):  # the same as in the test before
            self._obj_map[name] = module

        monkeypatch.setattr(registry, "_do_register", register_anew)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_args, **_kwargs: self)
    original = torch.Tensor.to

    def to(self, *args, **kwargs):
        args = tuple("cpu" if arg == "cuda" else arg for arg in args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)

    def load(name: str):
        module = importlib.import_module(name)
        # Their modules must not survive the test, nor meet those of another checkout.
        for name, loaded in list(sys.modules.items()):
            if name.split(".")[0] in THEIR_PACKAGES or isinstance(loaded, Absent):
                sys.modules.pop(name)
                monkeypatch.setitem(sys.modules, name, loaded)
        return module

    load.path = path
    return load


def use_float64(monkeypatch):
    """Let all code compute in float64, also where it asks for float32 by name."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


class GivenFeatures(nn.Module):
    """In place of their backbone: features that are already there, and their position encoding."""

    def __init__(self, load_nested, features, padding, position):
        super().__init__()
        self.nested, self.features, self.padding = load_nested, features, padding
        self.position = position
        self.num_channels = features[-1].shape[1]
        self.strides = [32]

    def forward(self, _samples):
        nested = []
        for feature in self.features:
            size = feature.shape[-2:]
            padding = nn.functional.interpolate(self.padding[None].float(), size=size)[0].bool()
            nested.append(self.nested(feature, padding))
        if self.position is None:
            return nested
        return nested, [self.position(one) for one in nested]


def randomize(model: nn.Module, scale: float = 0.05) -> None:
    """Random values everywhere, also where training starts from zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * scale


def objects(*counts: int, num_classes: int = 91):
    """Targets in their form and in ours."""
    theirs, ours = [], []
    for key, count in enumerate(counts):
        generator = torch.Generator().manual_seed(key)
        boxes = torch.rand(count, 4, generator=generator) * 0.4
        boxes = boxes + torch.tensor([0.3, 0.3, 0.05, 0.05])
        labels = torch.randint(num_classes, (count,), generator=generator)
        theirs.append({"labels": labels, "boxes": boxes})
        ours.append(Target(labels, boxes, noise_seed=key))
    return theirs, pad_targets(ours)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def layers_of(output: dict, name: str) -> torch.Tensor:
    """[L, B, Q, ...]: all layers of their output, the last being the main one."""
    return torch.stack([*(aux[name] for aux in output["aux_outputs"]), output[name]])
