"""The authors' treatment of padding, for weights trained with it.

By default the result for an image does not depend on the padding that other images of its batch
cause. In the authors' code it does. Each module with an attribute `as_published` has both forms and
says what differs:

- `models.query_positions.BoxPosition`: scales boxes by the padded canvas (DAB-Deformable-DETR,
  DINO, Mask DINO);
- `models.proposals.ProposalHead`, `methods.mask_dino.TokenHead`: padding and border tokens propose
  (two-stage Deformable DETR, H-DETR, DINO, Mask DINO);
- `layers.row_column_attention.RowColumnAttention`: means include padding (Anchor DETR);
- `models.detection_transformer.DETR` with masks: padding is part of the image (Mask2Former, Mask
  DINO), and `d2.data.mapper` pads training images to one size;
- `methods.mask_dino.TokenQueries`: boxes around masks are a cell smaller, and in a corner for empty
  masks;
- `auxiliary.denoising.DenoisingQueries`: empty queries are visible, and in DINO and Mask DINO they
  are trained as negatives.
"""

from __future__ import annotations

from torch import nn


def set_as_published(model: nn.Module, enabled: bool = True) -> None:
    """Switch every module of the model that has an attribute `as_published`."""
    for module in model.modules():
        if hasattr(module, "as_published"):
            module.as_published = enabled  # type: ignore[assignment]
