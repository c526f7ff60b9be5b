"""H-Deformable-DETR: one-to-one matching, plus an auxiliary one-to-many branch in training.

Ding Jia et al., "DETRs with Hybrid Matching", 2207.13080.

What differs from two-stage Deformable DETR:
 - hybrid matching (sec. 3.2, `auxiliary.extra_queries`): in training, the next best proposals
   become extra queries, and each object is matched to several of them; the two sets do not attend
   to each other;
 - its "tricks" (sec. 4.2): content is learned instead of computed from the box (mixed query
   selection); a box is an offset from the updated reference with gradient (look forward twice);
   wider feed-forward blocks and no dropout (set in the configuration).

Denoising (not in the paper): as in two-stage Deformable DETR.

Deviations from the authors' code: those of two-stage Deformable DETR.
"""

from __future__ import annotations

from dn_detr.layers.position_encoding import SinePosition
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import DeformableConfig
from dn_detr.models.multi_scale import deformable_detector
from dn_detr.models.prediction_heads import IterativeRefinement, own_heads
from dn_detr.models.proposals import BoxTransform, ProposalQueries
from dn_detr.models.query_positions import LearnedPosition


def h_deformable(
    config: DeformableConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build H-Deformable-DETR."""
    c = config
    return deformable_detector(
        c,
        in_channels,
        strides,
        image_position=SinePosition(channels=c.channels, temperature=10000.0, cell_offset=-0.5),
        query_design=ProposalQueries(
            content=content.without_indicator(),
            num_queries=c.num_queries,
            transform=BoxTransform(c.channels),
            has_rows=True,
            is_class_agnostic=True,
            has_no_object=c.has_no_object,
            epsilon=c.epsilon,
        ),
        position=LearnedPosition(),
        predictor=IterativeRefinement(
            heads=own_heads(c),
            norm=None,
            looks_forward_twice=True,
            epsilon=c.epsilon,
        ),
    )
