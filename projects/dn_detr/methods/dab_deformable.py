"""DAB-Deformable-DETR, fully deformable: dynamic anchor boxes in Deformable DETR.

Shilong Liu et al., "DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR", 2201.12329,
appendix C; with denoising it is the DN-Deformable-DETR (v2) of 2203.01305.

What differs from DETR:
 - several feature levels, deformable attention in encoder and decoder (2010.04159);
 - a query is a learned box (the reference, refined by every layer) with learned content;
 - its position is an MLP of the sines of the box, scaled by the content from the second layer on;
 - every layer has its own heads without a norm before them, so that the predicted box of a layer is
   the reference of the next; the reference is detached (look forward once).

Deviations from the authors' code: theirs scales the box by the unpadded fraction of the finest map
before taking sines, and leaves empty denoising queries visible; `as_published` does both
(`models.published`).
"""

from __future__ import annotations

from dn_detr.layers.position_encoding import SinePosition
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.model_config import DeformableConfig
from dn_detr.models.multi_scale import deformable_detector
from dn_detr.models.prediction_heads import IterativeRefinement, own_heads
from dn_detr.models.query_designs import BoxQueries
from dn_detr.models.query_positions import BoxPosition


def dab_deformable(
    config: DeformableConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build DAB-Deformable-DETR with deformable encoder and decoder."""
    c = config
    return deformable_detector(
        c,
        in_channels,
        strides,
        image_position=SinePosition(channels=c.channels, temperature=10000.0, cell_offset=-0.5),
        query_design=BoxQueries(content=content, num_queries=c.num_queries, epsilon=c.epsilon),
        position=BoxPosition(
            channels=c.channels,
            scales_with_content=True,
        ),
        predictor=IterativeRefinement(
            heads=own_heads(c, size_bias=-2.0),
            norm=None,
            looks_forward_twice=False,
            epsilon=c.epsilon,
        ),
    )
