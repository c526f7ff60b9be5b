"""Builds the core of a detector, its matching costs and its losses from a configuration."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from dn_detr.build import BoxPrompting, Denoising, HybridMatching, LossConfig, build_model
from dn_detr.d2.config.fields import T, read_fields
from dn_detr.d2.modeling.feature_names import check_features
from dn_detr.losses.criterion import Criterion
from dn_detr.losses.matching_costs import MatchingCosts
from dn_detr.losses.teacher_loss import Teach, Teaching
from dn_detr.methods import config_class
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import ModelConfig


def core_from(cfg: CfgNode, shapes: dict[str, ShapeSpec]) -> DETR:
    """Build the core with its auxiliary queries; shapes: of the backbone's features."""
    node = cfg.MODEL.DN_DETR
    check_features("MODEL.DN_DETR.IN_FEATURES", node.IN_FEATURES, shapes)

    def enabled(part: CfgNode, kind: type[T]) -> T | None:
        return read_fields(part, kind) if part.ENABLED else None

    core = build_model(
        node.METHOD,
        model_config_from(node),
        in_channels=[shapes[name].channels for name in node.IN_FEATURES],
        strides=[shapes[name].stride for name in node.IN_FEATURES],
        denoising=enabled(node.DENOISING, Denoising),
        num_groups=node.NUM_GROUPS,
        hybrid=enabled(node.HYBRID, HybridMatching),
        prompts=enabled(node.BOX_PROMPTS, BoxPrompting),
    )
    if (core.mask_head is not None) != cfg.MODEL.MASK_ON:
        raise ValueError(
            f"MODEL.MASK_ON is {cfg.MODEL.MASK_ON}, but {node.METHOD} predicts "
            f"{'masks' if core.mask_head is not None else 'no masks'}"
        )
    return core


def model_config_from(node: CfgNode) -> ModelConfig:
    """The hyper-parameters of MODEL.DN_DETR.METHOD."""
    return read_fields(node, config_class(node.METHOD), has_no_object=node.LOSS.KIND == "softmax")


def losses_from(cfg: CfgNode) -> tuple[MatchingCosts, Criterion, Teaching | None]:
    """Matching costs, losses, and losses of a teacher's boxes (None without
    MODEL.DN_DETR.TEACH).
    """
    node = cfg.MODEL.DN_DETR
    loss = read_fields(node.LOSS, LossConfig)
    costs: MatchingCosts = loss.costs()
    masks = None
    if cfg.MODEL.MASK_ON:
        costs = loss.costs_with_masks()
        masks = loss.mask_terms(without=() if node.DENOISING.MASKS else ("dn",))
    teaching = None
    if node.TEACH.ENABLED:
        if node.BOX_PROMPTS.ENABLED:
            raise ValueError(
                "MODEL.DN_DETR.TEACH and BOX_PROMPTS exclude each other: boxes of a teacher do not "
                "say which of them are given"
            )
        teaching = Teaching(
            read_fields(node.TEACH, Teach),
            costs=loss.costs(),
            no_object_weight=loss.no_object_weight,
            segments=("match", "group") if node.NUM_GROUPS > 1 else ("match",),
        )
    return costs, loss.criterion(masks), teaching
