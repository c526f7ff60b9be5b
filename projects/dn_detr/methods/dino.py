"""DINO: DETR with improved denoising anchor boxes.

Hao Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection",
2203.03605.

What differs from DAB-Deformable-DETR:
 - mixed query selection (sec. 3.4): query boxes are the best encoder proposals, query content is
   learned; proposals have their own heads, and only the selected ones are trained, with their
   classes;
 - look forward twice (sec. 3.5): a box is an offset from the updated reference with gradient;
 - all layers share their heads and a norm before them, which the reference update skips; positions
   are not scaled by the content;
 - contrastive denoising (sec. 3.3, `auxiliary.denoising`): a positive and a negative copy of every
   object; no indicator is appended to the label embedding.

Deviations from the authors' code: padding tokens and tokens at the image border never become
queries, positions ignore the padded canvas, empty denoising queries are masked and are not
negatives (theirs in all three: `models.published`); images with more objects than the budget noise
a random subset; the proposal head does not start as a copy of the decoder's heads.
"""

from __future__ import annotations

from torch import nn

from dn_detr.layers.position_encoding import SinePosition
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import DeformableConfig
from dn_detr.models.multi_scale import deformable_detector
from dn_detr.models.prediction_heads import normed_iterative_refinement
from dn_detr.models.proposals import ProposalParameters, ProposalQueries
from dn_detr.models.query_positions import BoxPosition


class RankQueries(ProposalQueries):
    """`ProposalQueries` whose learned content starts Xavier-uniformly (code of DINO)."""

    def new_parameters(self, num_queries: int, own_head: bool = True) -> ProposalParameters:
        """Create the parameters of extra queries, with a proposal head if `own_head`."""
        parameters = super().new_parameters(num_queries, own_head)
        nn.init.xavier_uniform_(parameters.content)  # type: ignore[arg-type]
        return parameters


def dino(
    config: DeformableConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build DINO."""
    c = config
    return deformable_detector(
        c,
        in_channels,
        strides,
        image_position=SinePosition(channels=c.channels, temperature=20.0, cell_offset=0.0),
        query_design=RankQueries(
            content=content.without_indicator(),
            num_queries=c.num_queries,
            transform=None,
            has_rows=True,
            is_class_agnostic=False,
            has_no_object=c.has_no_object,
            epsilon=c.epsilon,
        ),
        position=BoxPosition(
            channels=c.channels,
            scales_with_content=False,
        ),
        predictor=normed_iterative_refinement(c),
    )
