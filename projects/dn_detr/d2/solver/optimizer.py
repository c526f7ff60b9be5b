"""AdamW, or SGD, with the learning-rate groups of the DETR family."""

from __future__ import annotations

import torch
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from dn_detr.errors import InputError

SAMPLING_LAYERS = ("sampling_offsets", "reference_points")
"""Linear layers that place points; they learn slower (2010.04159, appendix A.4)."""


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    backbone_multiplier: float,
    sampling_multiplier: float,
    weight_decay: float,
    weight_decay_norm: float | None,
    backbone_layer_decay: float = 1.0,
) -> list[dict]:
    """One group for each (learning rate, weight decay) in use; every trainable parameter once."""
    depth = backbone_depths(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen = set()
    for module_name, module in model.named_modules():
        is_norm = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr, decay = base_lr, weight_decay
            path = f"{module_name}.{name}".split(".")
            if "backbone" in path:
                lr *= backbone_multiplier
                lr *= backbone_layer_decay ** depth[f"{module_name}.{name}"]
            elif any(layer in path for layer in SAMPLING_LAYERS):
                lr *= sampling_multiplier
            if is_norm and weight_decay_norm is not None:
                decay = weight_decay_norm
            groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def backbone_depths(model: nn.Module) -> dict[str, int]:
    """How many layers of the backbone stand behind each of its parameters: 0 in the last.

    A layer is what its name has up to the first part that ends with a digit (a stage "res3", a block
    "blocks.7"), else the module that holds the parameter; layers are counted in the order in which
    they are registered, that of the forward pass in the backbones of Detectron2, torchvision, timm.
    """
    layers: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if "backbone" not in parts:
            continue
        inside = parts[parts.index("backbone") + 1 : -1]
        numbered = [place for place, part in enumerate(inside) if part[-1:].isdigit()]
        layer = inside[: numbered[0] + 1] if numbered else inside
        layers.setdefault(".".join(layer), []).append(name)
    last = len(layers) - 1
    return {name: last - place for place, names in enumerate(layers.values()) for name in names}


def build_optimizer(cfg, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER, "ADAMW" or "SGD", with Detectron2's gradient clipping.

    CLIP_TYPE "full_model" clips the norm of all gradients together, as the DETR family does;
    Detectron2's own types clip each parameter alone.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in ("ADAMW", "SGD"):
        raise InputError(f"SOLVER.OPTIMIZER must be 'ADAMW' or 'SGD', got {solver.OPTIMIZER!r}.")
    if not 0 < solver.BACKBONE_LAYER_DECAY <= 1:
        raise InputError(
            f"SOLVER.BACKBONE_LAYER_DECAY must be in (0, 1], got {solver.BACKBONE_LAYER_DECAY}."
        )
    groups = parameter_groups(
        model,
        base_lr=solver.BASE_LR,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
        sampling_multiplier=solver.SAMPLING_MULTIPLIER,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        backbone_layer_decay=solver.BACKBONE_LAYER_DECAY,
    )
    kind, options = torch.optim.AdamW, {"fused": True}
    if solver.OPTIMIZER == "SGD":
        kind = torch.optim.SGD
        options = {"fused": True, "momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        kind = clipping_full_model(kind, clip.CLIP_VALUE)
    else:
        kind = maybe_add_gradient_clipping(cfg, kind)
    return kind(groups, lr=solver.BASE_LR, **options)


def clipping_full_model(kind: type, max_norm: float) -> type:
    """The optimizer `kind`, after clipping the norm of all gradients together to `max_norm`."""

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return super(clipped, self).step(closure)

    clipped = type(f"FullModelClipped{kind.__name__}", (kind,), {"step": step})
    return clipped
