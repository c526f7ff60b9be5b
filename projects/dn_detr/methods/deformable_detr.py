"""Deformable DETR: attention to a few sampled points of several feature levels.

Xizhou Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
2010.04159; its three variants: plain, with iterative box refinement, and two-stage.

What differs from DETR:
 - several feature levels; encoder and decoder attend to a few points sampled around a reference
   instead of to all tokens;
 - a query has learned content and a learned position; its reference point is predicted from the
   position, and boxes are predicted as offsets from the point;
 - with refinement, every layer has its own heads and updates the reference, which is detached; from
   the second layer on the reference is a box whose size scales the sampling offsets;
 - two-stage: every token predicts a box and an objectness score; the best become queries, whose
   position and content are computed from the box alone.

Denoising (not in the paper): the reference is the noised centre, the position a linear embedding of
the noised box, the content the label embedding; two-stage models use their own box transform.

Deviations from the authors' code: padding tokens and tokens at the image border neither become
queries nor enter the proposal loss (theirs do, as negatives: `models.published`); the proposal head
does not start as a copy of the decoder's heads.
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
    """Build Deformable DETR with shared heads and boxes relative to the reference point."""
    c = config
    return deformable_detector(
        c,
        in_channels,
        strides,
        image_position=image_position(c),
        query_design=learned_queries(c, content),
        position=LearnedPosition(),
        predictor=PointOffsetBoxes(
            heads=shared_heads(c, size_bias=-2.0), norm=None, epsilon=c.epsilon
        ),
    )


def deformable_detr_refine(
    config: DeformableConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build Deformable DETR with iterative box refinement (sec. 4.2 and appendix A.4)."""
    c = config
    return deformable_detector(
        c,
        in_channels,
        strides,
        image_position=image_position(c),
        query_design=learned_queries(c, content),
        position=LearnedPosition(),
        predictor=iterative_refinement(c, size_bias=-2.0),
    )


def deformable_detr_two_stage(
    config: DeformableConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build two-stage Deformable DETR with box refinement (sec. 4.2 and appendix A.4)."""
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
        predictor=iterative_refinement(c, size_bias=0.0),
    )


class LinearPoint(nn.Module):
    """Predict the reference point of a query from its position by a linear layer (sec. 4.1)."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.reference_points = nn.Linear(channels, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, content: Tensor, position: Tensor) -> Tensor:
        """Map position [..., C] to point logits [..., 2]; content is unused."""
        return self.reference_points(position)


def learned_queries(c: DeformableConfig, content: QueryContent) -> LearnedQueries:
    return LearnedQueries(
        content=content,
        num_queries=c.num_queries,
        has_rows=True,
        point=LinearPoint(channels=c.channels),
        epsilon=c.epsilon,
    )


def image_position(c: DeformableConfig) -> SinePosition:
    return SinePosition(channels=c.channels, temperature=10000.0, cell_offset=-0.5)


def iterative_refinement(c: DeformableConfig, *, size_bias: float) -> IterativeRefinement:
    return IterativeRefinement(
        heads=own_heads(c, size_bias),
        norm=None,
        looks_forward_twice=False,
        epsilon=c.epsilon,
    )
