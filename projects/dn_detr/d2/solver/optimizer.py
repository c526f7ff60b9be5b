"""AdamW or SGD with the learning-rate groups of DETR-like detectors."""

from __future__ import annotations

import torch
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from dn_detr.errors import InputError

SAMPLING_LAYERS = ("sampling_offsets", "reference_points")
"""Linear layers that predict points; they have a lower rate (2010.04159, appendix A.4)."""

PYRAMID = "pyramid"
"""Module of a backbone that no pretrained weights have, and that learns like the detector."""

EMBEDDINGS = (
    "query_design.content.label_embedding.weight",
    "query_design.learned.content",
    "query_design.learned.position",
    "decoder.level_embedding",
)
"""Ends of the names of what is an nn.Embedding in Mask2Former's code."""


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    backbone_multiplier: float,
    sampling_multiplier: float,
    weight_decay: float,
    weight_decay_norm: float | None,
    weight_decay_embed: float | None = None,
    backbone_layer_decay: float = 1.0,
) -> list[dict]:
    """Group the trainable parameters of a model by learning rate and weight decay.

    Args:
        model: Model to train.
        base_lr: Learning rate.
        backbone_multiplier: Factor of the rate in the backbone.
        sampling_multiplier: Factor of the rate in SAMPLING_LAYERS.
        weight_decay: Weight decay.
        weight_decay_norm: Weight decay of norms; None uses `weight_decay`.
        weight_decay_embed: Weight decay of EMBEDDINGS; None uses `weight_decay`.
        backbone_layer_decay: Factor of the rate per layer of the backbone, from the last one.
    """
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
            if "backbone" in path and PYRAMID not in path:
                lr *= backbone_multiplier
                lr *= backbone_layer_decay ** depth[f"{module_name}.{name}"]
            elif any(layer in path for layer in SAMPLING_LAYERS):
                lr *= sampling_multiplier
            if is_norm and weight_decay_norm is not None:
                decay = weight_decay_norm
            if weight_decay_embed is not None and f"{module_name}.{name}".endswith(EMBEDDINGS):
                decay = weight_decay_embed
            groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def backbone_depths(model: nn.Module) -> dict[str, int]:
    """Count the layers of the backbone after each of its parameters: 0 in the last layer.

    A layer is a module whose name ends at the first part with a final digit (a stage "res3", a
    block "blocks.7"), or all neighbours without digits (position and patch embedding). Layers count
    in the order of registration, which is that of the forward pass in Detectron2, torchvision and
    timm.
    """
    layers: dict[str, list[str]] = {}
    layer, was_numbered = "", True
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if "backbone" not in parts or PYRAMID in parts:
            continue
        inside = parts[parts.index("backbone") + 1 : -1]
        numbered = [i for i, part in enumerate(inside) if part[-1:].isdigit()]
        if numbered or was_numbered:
            layer = ".".join(inside[: numbered[0] + 1] if numbered else inside)
        was_numbered = bool(numbered)
        layers.setdefault(layer, []).append(name)
    last = len(layers) - 1
    return {name: last - i for i, names in enumerate(layers.values()) for name in names}


def build_optimizer(cfg, model: nn.Module) -> torch.optim.Optimizer:
    """Build SOLVER.OPTIMIZER, "ADAMW" or "SGD", with gradient clipping.

    CLIP_TYPE "full_model" clips the total norm of all gradients, as in DETR; Detectron2's own types
    clip each parameter separately.
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
        weight_decay_embed=solver.WEIGHT_DECAY_EMBED,
        backbone_layer_decay=solver.BACKBONE_LAYER_DECAY,
    )
    kind, options = torch.optim.AdamW, {"fused": True}
    if solver.OPTIMIZER == "SGD":
        kind = torch.optim.SGD
        options = {"fused": True, "momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV}
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        optimizer = kind(groups, lr=solver.BASE_LR, **options)
        clip_full_model(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
        return optimizer
    kind = maybe_add_gradient_clipping(cfg, kind)
    return kind(groups, lr=solver.BASE_LR, **options)


def clip_full_model(
    optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0
) -> None:
    """Clip the total norm of all gradients to `max_norm` before each step of an optimizer.

    Whoever has computed the 2-norm sets `optimizer.gradient_norm`, which holds for one step.
    """

    def clip(optimizer, args, kwargs) -> None:  # noqa: ARG001
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = vars(optimizer).pop("gradient_norm", None)
        if norm is None or norm_type != 2:
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients, norm_type)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)

    optimizer.register_step_pre_hook(clip)
