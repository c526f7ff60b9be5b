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
from dn_detr.models.learned_queries import SlotQueries
from dn_detr.models.model_config import Numbers
from dn_detr.models.multi_scale import deformable_detector
from dn_detr.models.prediction_heads import OffsetFromPoint, Refined, own_heads, shared_heads
from dn_detr.models.proposals import BoxTransform, ProposalQueries
from dn_detr.models.query_positions import LearnedPosition


def deformable_detr(
    numbers: Numbers, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """All layers share their heads; boxes are offsets from the slot's point."""
    n = numbers
    return deformable_detector(
        n,
        in_channels,
        strides,
        image_position=image_position(n),
        query_design=slots(n, content),
        position=LearnedPosition(),
        predictor=OffsetFromPoint(
            heads=shared_heads(n, size_bias=-2.0), norm=None, epsilon=n.epsilon
        ),
    )


def deformable_detr_refine(
    numbers: Numbers, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """With iterative box refinement (sec. 4.2 and appendix A.4)."""
    n = numbers
    return deformable_detector(
        n,
        in_channels,
        strides,
        image_position=image_position(n),
        query_design=slots(n, content),
        position=LearnedPosition(),
        predictor=refined(n, size_bias=-2.0),
    )


def deformable_detr_two_stage(
    numbers: Numbers, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Refinement from proposals of the encoder (sec. 4.2 and appendix A.4)."""
    n = numbers
    return deformable_detector(
        n,
        in_channels,
        strides,
        image_position=image_position(n),
        query_design=ProposalQueries(
            content=content.without_indicator(),
            num_queries=n.num_queries,
            transform=BoxTransform(n.channels),
            has_rows=False,
            is_class_agnostic=True,
            has_no_object=n.has_no_object,
            epsilon=n.epsilon,
        ),
        position=LearnedPosition(),
        predictor=refined(n, size_bias=0.0),
    )


class LinearPoint(nn.Module):
    """The reference point of a slot: a linear layer of its position, as logits (sec. 4.1)."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.reference_points = nn.Linear(channels, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def forward(self, content: Tensor, position: Tensor) -> Tensor:
        return self.reference_points(position)


def slots(n: Numbers, content: QueryContent) -> SlotQueries:
    return SlotQueries(
        content=content,
        num_queries=n.num_queries,
        has_rows=True,
        point=LinearPoint(channels=n.channels),
        epsilon=n.epsilon,
    )


def image_position(n: Numbers) -> SinePosition:
    return SinePosition(channels=n.channels, temperature=10000.0, cell_offset=-0.5)


def refined(n: Numbers, *, size_bias: float) -> Refined:
    return Refined(
        heads=own_heads(n, size_bias),
        norm=None,
        looks_forward_twice=False,
        epsilon=n.epsilon,
    )
