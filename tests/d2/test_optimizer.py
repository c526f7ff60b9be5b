"""Learning-rate groups and clipping."""

import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.modeling.timm_torchvision import build_named_backbone
from dn_detr.d2.solver.optimizer import (
    backbone_depths,
    build_optimizer,
    clip_full_model,
    parameter_groups,
)
from dn_detr.errors import InputError


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.SOLVER.BASE_LR = 1.0
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.5
    cfg.SOLVER.SAMPLING_MULTIPLIER = 0.25
    cfg.SOLVER.WEIGHT_DECAY = 0.125
    return cfg


def test_backbone_and_sampling_layers_learn_slower_and_nothing_is_left_out(tiny_config):
    cfg = tiny_config(
        *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.BACKBONE.FREEZE_AT", 2),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 8),
        *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DN_DETR.METHOD", "deformable_detr"),
        *("SOLVER.BASE_LR", 1.0, "SOLVER.BACKBONE_MULTIPLIER", 0.5),
        *("SOLVER.SAMPLING_MULTIPLIER", 0.25),
    )
    model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    learned = [parameter for group in groups for parameter in group["params"]]
    assert len(learned) == len(set(learned))
    lr_of = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    seen = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter not in lr_of and name.startswith(("backbone.stem", "backbone.res2"))
            continue
        if name.startswith("backbone."):
            expected = 0.5
        elif "sampling_offsets" in name or "reference_points" in name:
            expected = 0.25
        else:
            expected = 1.0
        assert lr_of.pop(parameter) == expected, name
        seen.add(expected)
    assert not lr_of and seen == {0.25, 0.5, 1.0}


def test_norms_can_have_a_weight_decay_of_their_own():
    model = nn.ModuleDict(
        {"linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "group": nn.GroupNorm(1, 2)}
    )
    numbers = {"base_lr": 1.0, "backbone_multiplier": 1.0, "sampling_multiplier": 1.0}
    groups = parameter_groups(model, **numbers, weight_decay=0.1, weight_decay_norm=0.0)
    decay_of = {p: group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay_of[parameter] == (0.1 if "linear" in name else 0.0), name
    (group,) = parameter_groups(model, **numbers, weight_decay=0.1, weight_decay_norm=None)
    assert len(group["params"]) == 6 and group["weight_decay"] == 0.1


def test_a_shared_parameter_is_learned_once():
    shared = nn.Linear(2, 2)
    model = nn.ModuleList([shared, nn.Sequential(shared)])
    numbers = {"base_lr": 1.0, "backbone_multiplier": 1.0, "sampling_multiplier": 1.0}
    (group,) = parameter_groups(model, **numbers, weight_decay=0.1, weight_decay_norm=None)
    assert len(group["params"]) == 2


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_full_model_clipping_scales_all_gradients_by_one_factor(cfg, scale):
    """Over two steps, as AdamW forgets the scale of a single one."""
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2, bias=False), "head": nn.Linear(2, 1)})
    optimizer = build_optimizer(cfg, model)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    rates = [0.5, 1.0, 1.0]
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2):
        gradients = [torch.randn(p.shape, generator=generator) * scale * step for p in expected]
        norm = sum((gradient**2).sum() for gradient in gradients).sqrt()
        assert (norm > 0.5) == (scale == 1.0)
        factor = min(1.0, 0.5 / (norm.item() + 1e-6))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for i, gradient in enumerate(gradients):
            first, second = moments[i]
            clipped = gradient * factor
            first.mul_(0.9).add_(0.1 * clipped)
            second.mul_(0.999).add_(0.001 * clipped**2)
            ahead = first / (1 - 0.9**step)
            size = (second / (1 - 0.999**step)).sqrt() + 1e-8
            expected[i] = expected[i] * (1 - rates[i] * 0.125) - rates[i] * ahead / size
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_detectron2s_own_clipping_still_works(cfg):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.25
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    assert all((parameter.grad == 0.25).all() for parameter in model.parameters())


def test_layers_of_the_backbone_learn_slower_the_earlier_they_stand(tiny_config):
    cfg = tiny_config(
        *("MODEL.BACKBONE.FREEZE_AT", 0, "SOLVER.BASE_LR", 1.0, "SOLVER.BACKBONE_MULTIPLIER", 0.5),
        *("SOLVER.SAMPLING_MULTIPLIER", 1.0, "SOLVER.BACKBONE_LAYER_DECAY", 0.25),
    )
    model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    lr_of = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        stages = ("backbone.res5", "backbone.res4", "backbone.res3", "backbone.res2", "backbone.")
        behind = next((i for i, stage in enumerate(stages) if name.startswith(stage)), None)
        assert lr_of[parameter] == (1.0 if behind is None else 0.5 * 0.25**behind), name


def test_blocks_of_a_transformer_are_layers_and_what_stands_before_them():
    trunk = nn.ModuleDict({"patch_embed": nn.Linear(2, 2)})
    trunk["blocks"] = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))] * 1)
    trunk["blocks"].append(nn.Linear(2, 2))
    depths = backbone_depths(nn.ModuleDict({"backbone": trunk, "core": nn.Linear(2, 2)}))
    assert depths == {
        **{f"backbone.patch_embed.{part}": 2 for part in ("weight", "bias")},
        **{f"backbone.blocks.0.{i}.{part}": 1 for i in (0, 1) for part in ("weight", "bias")},
        **{f"backbone.blocks.1.{part}": 0 for part in ("weight", "bias")},
    }


def test_a_plain_vision_transformer_learns_slower_the_earlier_its_blocks():
    """As in ViTDet: embeddings, blocks, the norm. The pyramid is new and learns like the rest."""
    pytest.importorskip("timm")
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    node = cfg.MODEL.DN_DETR
    node.BACKBONE, node.BACKBONE_PRETRAINED = "timm/vit_tiny_patch16_224", False
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    model = nn.ModuleDict({"backbone": build_named_backbone(cfg, None)})
    options = {"base_lr": 1.0, "backbone_multiplier": 0.5, "sampling_multiplier": 1.0}
    groups = parameter_groups(
        model, **options, weight_decay=0.1, weight_decay_norm=None, backbone_layer_decay=0.5
    )
    lr_of = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    found = {name: lr_of[parameter] for name, parameter in model.named_parameters()}
    inside = "backbone.stages.model."
    for name, lr in found.items():
        block = re.match(rf"{inside}blocks\.(\d+)\.", name)
        behind = 12 - int(block[1]) if block else 0 if name.startswith(f"{inside}norm.") else 13
        assert lr == (1.0 if ".pyramid." in name else 0.5 * 0.5**behind), name
    assert {f"{inside}pos_embed", f"{inside}blocks.11.mlp.fc2.bias"} < set(found)
    assert "backbone.pyramid.res3.weight" in found


def test_a_layer_decay_above_one_is_refused(cfg):
    cfg.SOLVER.BACKBONE_LAYER_DECAY = 1.5
    with pytest.raises(InputError, match=r"must be in \(0, 1\], got 1.5"):
        build_optimizer(cfg, nn.Linear(1, 1))


def test_sgd_adds_up_what_it_remembers_of_earlier_gradients(cfg):
    """Detectron2's default momentum of 0.9; weight decay 0.125, clipped to a norm of 2."""
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 2.0
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(8.0)
    optimizer = build_optimizer(cfg, model)
    for gradient, expected in ((1.0, 8 - (1 + 1)), (40.0, 6 - (0.9 * 2 + 2 + 0.75))):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_a_norm_that_is_already_known_is_used_for_one_step():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    clip_full_model(optimizer, 1.0)
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.gradient_norm = torch.tensor(10.0)
    optimizer.step()
    torch.testing.assert_close(parameter.grad, torch.tensor([0.3, 0.4]))
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
