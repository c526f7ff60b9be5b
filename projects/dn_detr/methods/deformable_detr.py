"""Deformable DETR: attention that samples few points of several feature levels.

Xizhou Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
2010.04159; its three variants: plain, with iterative box refinement, and two-stage.

What differs from DETR:
 - several feature levels; encoder and decoder attend to a few sampled points around a reference
   instead of to all cells;
 - a query is a learned slot: content, and a position from which its reference point follows; boxes
   are offsets from that point;
 - with refinement, every layer has heads of its own and moves the reference, which is detached; from
   the second layer on it is a box, whose size the sampling follows;
 - two-stage: every token proposes a box and says whether it is an object; the best become queries,
   and their position and content follow from the box alone.

Denoising (not in the paper): the noised centre is the reference, a linear embedding of the noised
box the position, the label the content; two-stage models take their own transform of the box.

Deviations from the authors' code: padding tokens and those at the very border neither become queries
nor enter the loss of the proposals (theirs can, as negatives).
"""

from __future__ import annotations

from torch import Tensor, nn

from dn_detr.layers.position_encoding import SinePosition
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.learned_queries import LearnedQueries
from dn_detr.models.model_config import DeformableConfig
from dn_detr.models.multi_scale import deformable_detector
from dn_detr.models.prediction_heads import (
    IterativeRefinement,
    PointOffsetBoxes,
    own_heads,
    shared_heads,
)
from dn_detr.models.proposals import BoxTransform, ProposalQueries
from dn_detr.models.query_positions import LearnedPosition


def deformable_detr(
    config: DeformableConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """All layers share their heads; boxes are offsets from the slot's point."""
    c = config
    return deformable_detector(
        c,
        in_channels,
        strides,
        image_position=image_position(c),
        query_design=slots(c, content),
        position=LearnedPosition(),
        predictor=PointOffsetBoxes(
            heads=shared_heads(c, size_bias=-2.0), norm=None, epsilon=c.epsilon
        ),
    )


def deformable_detr_refine(
    config: DeformableConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """With iterative box refinement (sec. 4.2 and appendix A.4)."""
    c = config
    return deformable_detector(
        c,
        in_channels,
        strides,
        image_position=image_position(c),
        query_design=slots(c, content),
        position=LearnedPosition(),
        predictor=refined(c, size_bias=-2.0),
    )


def deformable_detr_two_stage(
    config: DeformableConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Refinement from proposals of the encoder (sec. 4.2 and appendix A.4)."""
    c = config
    return deformable_detector(
        c,
        in_channels,
        strides,
        image_position=image_position(c),
        query_design=ProposalQueries(
            content=content.without_indicator(),
            num_queries=c.num_queries,
            transform=BoxTransform(c.channels),
            has_rows=False,
            is_class_agnostic=True,
            has_no_object=c.has_no_object,
            epsilon=c.epsilon,
        ),
        position=LearnedPosition(),
        predictor=refined(c, size_bias=0.0),
    )


class LinearPoint(nn.Module):
    """The reference point of a slot: a linear layer of its position, as logits (sec. 4.1)."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.reference_points = nn.Linear(channels, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, _content: Tensor, position: Tensor) -> Tensor:
        return self.reference_points(position)


def slots(c: DeformableConfig, content: QueryContent) -> LearnedQueries:
    return LearnedQueries(
        content=content,
        num_queries=c.num_queries,
        has_rows=True,
        point=LinearPoint(channels=c.channels),
        epsilon=c.epsilon,
    )


def image_position(c: DeformableConfig) -> SinePosition:
    return SinePosition(channels=c.channels, temperature=10000.0, cell_offset=-0.5)


def refined(c: DeformableConfig, *, size_bias: float) -> IterativeRefinement:
    return IterativeRefinement(
        heads=own_heads(c, size_bias),
        norm=None,
        looks_forward_twice=False,
        epsilon=c.epsilon,
    )
