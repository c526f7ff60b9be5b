"""DAB-DETR and DN-DETR."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dn_detr.conversion.table import Rule, Table, resnet
from dn_detr.conversion.tables.dense import HEADS, conditional_decoder_layers, encoder_layers


def label_table(labels: Tensor) -> dict[str, Tensor]:
    """DN-DETR's label embeddings [K + 1, C - 1]; the last one, "unknown", is also the content that
    all matched queries share, with an indicator of zero."""
    return {
        "query_design.content.label_table.weight": labels,
        "query_design.shared.row": F.pad(labels[-1:], (0, 1)),
    }


RULES: dict[str, Rule] = {
    **resnet("backbone.0.body"),
    "input_proj": "neck.projection",
    **encoder_layers(),
    "transformer.encoder.layers.{}.activation": "encoder.layers.{}.feed_forward.activation",
    "transformer.encoder.query_scale.layers.{}": "encoder.scale.layers.{}",
    **conditional_decoder_layers(),
    "transformer.decoder.layers.{}.activation": "decoder.layers.{}.feed_forward.activation",
    "transformer.decoder.norm": "decoder.predictor.norm",
    "transformer.decoder.query_scale.layers.{}": "decoder.position.scale.layers.{}",
    "transformer.decoder.ref_point_head.layers.{}": "decoder.position.of_box.layers.{}",
    "transformer.decoder.ref_anchor_head.layers.{}": "decoder.position.size.layers.{}",
    **HEADS,
    "transformer.decoder.bbox_embed.layers.{}": None,  # the box head once more
    "refpoint_embed.weight": "query_design.tables.anchors",
    "transformer.patterns.weight": "query_design.shared.patterns",
    "label_enc.weight": label_table,
}

TABLES = [
    Table(
        "IDEA-Research/DAB-DETR and IDEA-Research/DN-DETR",
        RULES,
        optional=frozenset({"transformer.patterns.weight", "label_enc.weight"}),
    )
]
