"""What a configuration says of a detector, as the parts of the core: model, costs, losses."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from dn_detr.build import (
    BoxPrompting,
    Denoising,
    HybridMatching,
    build_criterion,
    build_model,
    mask_terms,
)
from dn_detr.losses.criterion import Criterion
from dn_detr.losses.mask_costs import MaskCosts
from dn_detr.losses.mask_points import PointSampling
from dn_detr.losses.matcher import Costs
from dn_detr.losses.teacher_loss import Teaching
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import ModelConfig


def core_from(cfg: CfgNode, shapes: dict[str, ShapeSpec]) -> DETR:
    """The core, with its auxiliary. shapes: of the backbone's features."""
    node = cfg.MODEL.DN_DETR
    config = ModelConfig(
        num_classes=node.NUM_CLASSES,
        num_queries=node.NUM_QUERIES,
        channels=node.CHANNELS,
        num_heads=node.NUM_HEADS,
        num_levels=node.NUM_LEVELS,
        num_points=node.NUM_POINTS,
        feed_forward_dim=node.FEED_FORWARD_DIM,
        encoder_layers=node.ENCODER_LAYERS,
        decoder_layers=node.DECODER_LAYERS,
        dropout=node.DROPOUT,
        epsilon=node.EPSILON,
        scales_with_canvas=node.SCALES_WITH_CANVAS,
        num_patterns=node.NUM_PATTERNS,
        shares_content=node.SHARES_CONTENT,
        has_no_object=node.LOSS.KIND == "softmax",
        encoder_feed_forward_dim=node.ENCODER_FEED_FORWARD_DIM,
    )
    denoising = Denoising(
        num_groups=node.DENOISING.NUM_GROUPS,
        max_objects=node.DENOISING.MAX_OBJECTS,
        box_noise=node.DENOISING.BOX_NOISE,
        label_noise=node.DENOISING.LABEL_NOISE,
        is_contrastive=node.DENOISING.CONTRASTIVE,
        hides_empty=node.DENOISING.HIDES_EMPTY,
    )
    hybrid = HybridMatching(
        num_queries=node.HYBRID.NUM_QUERIES,
        matches_per_object=node.HYBRID.MATCHES_PER_OBJECT,
        weight=node.HYBRID.WEIGHT,
    )
    prompts = BoxPrompting(
        probability=node.BOX_PROMPTS.PROBABILITY,
        hidden_labels=node.BOX_PROMPTS.HIDDEN_LABELS,
        box_noise=node.BOX_PROMPTS.BOX_NOISE,
    )
    core = build_model(
        node.METHOD,
        config,
        in_channels=[shapes[name].channels for name in node.IN_FEATURES],
        strides=[shapes[name].stride for name in node.IN_FEATURES],
        denoising=denoising if node.DENOISING.ENABLED else None,
        num_groups=node.NUM_GROUPS,
        hybrid=hybrid if node.HYBRID.ENABLED else None,
        prompts=prompts if node.BOX_PROMPTS.ENABLED else None,
    )
    if cfg.MODEL.MASK_ON != (core.mask_head is not None):
        raise ValueError(
            f"MODEL.MASK_ON is {cfg.MODEL.MASK_ON}, but {node.METHOD} predicts "
            f"{'masks' if core.mask_head is not None else 'no masks'}"
        )
    return core


def costs_from(cfg: CfgNode) -> Costs:
    """The matching costs of classes and boxes."""
    loss = cfg.MODEL.DN_DETR.LOSS
    return Costs(
        class_cost=loss.COST_CLASS,
        l1=loss.COST_L1,
        giou=loss.COST_GIOU,
        kind="softmax" if loss.KIND == "softmax" else "focal",
        alpha=loss.FOCAL_ALPHA,
        gamma=loss.FOCAL_GAMMA,
    )


def with_masks(cfg: CfgNode, costs: Costs) -> Costs | MaskCosts:
    """The matching costs, with those of masks where there are masks."""
    loss = cfg.MODEL.DN_DETR.LOSS
    if not cfg.MODEL.MASK_ON:
        return costs
    return MaskCosts(
        others=costs,
        cross_entropy=loss.COST_MASK,
        dice=loss.COST_DICE,
        num_points=loss.MASK_POINTS,
    )


def criterion_from(cfg: CfgNode) -> Criterion:
    """The losses, with those of masks where there are masks."""
    node, masks = cfg.MODEL.DN_DETR, None
    loss = node.LOSS
    if cfg.MODEL.MASK_ON:
        masks = mask_terms(
            cross_entropy=loss.MASK_WEIGHT,
            dice=loss.DICE_WEIGHT,
            points=PointSampling(
                num_points=loss.MASK_POINTS,
                oversample=loss.MASK_OVERSAMPLE,
                importance=loss.MASK_IMPORTANCE,
            ),
            without=() if node.DENOISING.MASKS else ("dn",),
        )
    return build_criterion(
        class_weight=loss.CLASS_WEIGHT,
        l1_weight=loss.L1_WEIGHT,
        giou_weight=loss.GIOU_WEIGHT,
        focal_alpha=loss.FOCAL_ALPHA,
        focal_gamma=loss.FOCAL_GAMMA,
        kind=loss.KIND,
        mal_gamma=loss.MAL_GAMMA,
        no_object_weight=loss.NO_OBJECT_WEIGHT,
        masks=masks,
    )


def teaching_from(cfg: CfgNode, costs: Costs) -> Teaching | None:
    """The losses of teachers' boxes, None without them. costs: of classes and boxes."""
    node = cfg.MODEL.DN_DETR
    teach = node.TEACH
    if not teach.ENABLED:
        return None
    if node.BOX_PROMPTS.ENABLED:
        raise ValueError(
            "MODEL.DN_DETR.TEACH and BOX_PROMPTS exclude each other: boxes of a teacher do not say "
            "which of them are given"
        )
    return Teaching(
        costs=costs,
        weight=teach.WEIGHT,
        class_weight=teach.CLASS_WEIGHT,
        l1_weight=teach.L1_WEIGHT,
        giou_weight=teach.GIOU_WEIGHT,
        unmatched_weight=teach.UNMATCHED_WEIGHT,
        no_object_weight=node.LOSS.NO_OBJECT_WEIGHT,
        segments=("match", "group") if node.NUM_GROUPS > 1 else ("match",),
    )
