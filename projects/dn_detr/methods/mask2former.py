"""Mask2Former: masked-attention mask transformer, for instance segmentation.

Bowen Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation",
2112.01527.

What differs from DETR:
 - no boxes: a query predicts a class and a mask embedding; its mask is the product of the embedding
   and the mask features (`models.mask_head`), and evaluation uses the box around that mask;
 - masked attention (sec. 3.2.1): a query attends only to the region of its previous mask, or to all
   tokens if that mask is empty;
 - each decoder layer attends to one level of a deformable encoder, cycling coarse to fine (3.2.2);
 - cross-attention precedes self-attention, content is learned, and predictions are also made and
   trained before the first layer (3.2.3);
 - mask losses and matching costs are computed at random points (3.3, `losses.mask_points`).

Denoising (2203.01305, TPAMI version, code not released; `auxiliary.denoising`): the first attention
mask of a denoising query is the shifted mask of its object; later ones are its own predictions. The
paper does not specify content and position: here the content is the label embedding, and the
position is zero, as masked cross-attention precedes self-attention and already localises the query.

Deviations from the authors' code: padding is masked in attention and excluded from interpolation;
see also `losses.mask_points`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.layers.mlp import FeedForward
from dn_detr.layers.multihead_attention import DenseAttention, SelfAttention
from dn_detr.layers.point_sampling import moved_masks
from dn_detr.layers.position_encoding import SinePosition
from dn_detr.layers.query_attention import QueryAttentionMask, additive, attention_dtype
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.learned_queries import LearnedQueryParameters
from dn_detr.models.mask_head import MaskHead, MaskHeads, mask_logits
from dn_detr.models.model_config import ModelConfig, MultiScaleConfig
from dn_detr.models.multi_scale import deformable_encoder, feed_forward, multi_scale_neck
from dn_detr.models.neck import Flatten
from dn_detr.structures import Memory, Predictions, Queries, QueryState, Segment

POINTS_PER_SIDE = 4
"""A cell belongs to a shifted mask if any of 4 x 4 points in it does."""


def mask2former(
    config: MultiScaleConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build Mask2Former. The first backbone feature is used for the mask features only."""
    c = config
    position = SinePosition(channels=c.channels, temperature=10000.0, cell_offset=0.0)
    heads = MaskHeads(channels=c.channels, num_classes=c.num_classes, has_no_object=c.has_no_object)
    return DETR(
        neck=multi_scale_neck(c, in_channels[1:], strides[1:]),
        flatten=Flatten(position=position, channels=c.channels, num_levels=c.num_levels),
        encoder=deformable_encoder(c),
        query_design=MaskQueries(
            content=content.without_indicator(),
            num_queries=c.num_queries,
            heads=heads,
            first_level=level_of(0, c.num_levels),
        ),
        decoder=MaskedDecoder(
            layers=[masked_layer(c) for _ in range(c.decoder_layers)],
            position=position,
            heads=heads,
            channels=c.channels,
            num_levels=c.num_levels,
        ),
        mask_head=MaskHead(in_channels=in_channels[0], channels=c.channels),
    )


def level_of(layer: int, num_levels: int) -> int:
    """Return the level a decoder layer attends to, cycling from the coarsest to the finest."""
    return num_levels - 1 - layer % num_levels


def mask_features_at(memory: Memory, level: int) -> Tensor:
    """Resize the mask features to a level: [B, C, h, w]. Their masks are the resized masks, as
    interpolation and product commute.
    """
    return F.interpolate(memory.mask_features.features, memory.shapes[level], mode="bilinear")


class MaskQueries(nn.Module):
    """Queries with learned content and position; the reference is the mask, as logits at the level
    of the first decoder layer.

    Args:
        heads: shared with the decoder; a checkpoint contains them twice.
        first_level: index of the level that the first decoder layer attends to.
    """

    starts_from_masks = True

    def __init__(
        self, *, content: QueryContent, num_queries: int, heads: MaskHeads, first_level: int
    ):
        super().__init__()
        self.first_level = first_level
        self.content = content
        self.heads = heads
        self.learned = self.new_parameters(num_queries)

    def new_parameters(self, num_queries: int, own_head: bool = True) -> LearnedQueryParameters:
        """Make the parameters of extra queries (no proposal head in this design)."""
        return LearnedQueryParameters(
            position=nn.Parameter(torch.randn(num_queries, self.content.channels)),
            content=self.content.new_rows(num_queries),
        )

    def bind(self, memory: Memory) -> MaskSource:
        """Return the source of queries for one forward pass."""
        return MaskSource(self, memory)


class MaskSource:
    """Queries of `MaskQueries` for one forward pass."""

    def __init__(self, design: MaskQueries, memory: Memory):
        self.design = design
        self.memory = memory
        self.level = design.first_level

    def queries(
        self,
        learned: LearnedQueryParameters | None = None,
        first_rank: int = 0,
    ) -> Queries:
        """Make one "match" segment from `learned` (default: the parameters of the design)."""
        design, batch = self.design, self.memory.tokens.shape[0]
        learned = design.learned if learned is None else learned
        content = design.content.matched(learned.content).expand(batch, -1, -1)
        # Not under no_grad: autocast in torch 2.8 would cache the head weights without gradient.
        embeddings = design.heads(content)[1].detach()
        with torch.no_grad():
            reference = mask_logits(embeddings, mask_features_at(self.memory, self.level)).flatten(
                2
            )
        position = learned.position.expand(batch, -1, -1)
        state = QueryState(content, position, reference)
        return Queries(state, (Segment("match", content.shape[1]),))

    def from_masks(
        self, labels: Tensor, masks: tuple[Tensor, ...], object_of: Tensor, shift: Tensor
    ) -> QueryState:
        """Make denoising queries from shifted masks.

        Args:
            labels: [B, T] int64.
            masks: ground truth, as in `Targets`.
            object_of: [B, T] int64, the object whose mask is shifted.
            shift: [B, T, 2], x and y as fractions of the image size.
        """
        content = self.design.content.labels(labels)
        height, width = self.memory.shapes[self.level]
        points = self._points(height, width)
        hits = torch.stack(
            [moved_masks(*image) for image in zip(masks, object_of, shift, points, strict=True)]
        )
        is_on = hits.unflatten(2, (height * width, -1)).any(-1)
        return QueryState(content, torch.zeros_like(content), is_on.to(content.dtype) * 2 - 1)

    def _points(self, height: int, width: int) -> Tensor:
        """Points in all cells of the level, [B, h * w * 16, 2] in [0, 1] of the unpadded image."""
        valid = self.memory.valid_sizes[:, self.level]  # w, h
        inner = (torch.arange(POINTS_PER_SIDE, device=valid.device) + 0.5) / POINTS_PER_SIDE
        x = torch.arange(width, device=valid.device)[None, :, None, None] + inner[None, None, None]
        y = torch.arange(height, device=valid.device)[:, None, None, None] + inner[:, None]
        cells = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # [h, w, 4, 4, 2]
        return cells.flatten(0, 3) / valid[:, None]


class MaskedLayer(nn.Module):
    """Masked cross-attention, self-attention and feed-forward, each with a residual and a norm."""

    def __init__(
        self,
        *,
        cross_attention: DenseAttention,
        self_attention: SelfAttention,
        feed_forward: FeedForward,
        channels: int,
        dropout: float,
    ):
        super().__init__()
        self.cross_attention = cross_attention
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)
        self.self_attention = self_attention
        self.feed_forward = feed_forward

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor,
        mask: Tensor,
        query_mask: QueryAttentionMask,
    ) -> Tensor:
        """Update the content [B, Q, C].

        Args:
            position: [B, Q, C].
            key, value: [B, S, C] of one level.
            padding: [B, S] bool.
            mask: additive attention mask [B, 1, Q, S].
        """
        update = self.cross_attention(content + position, key, value, padding, prior=mask)
        content = self.norm(content + self.dropout(update))
        return self.feed_forward(self.self_attention(content, position, query_mask))


def masked_layer(config: ModelConfig) -> MaskedLayer:
    sizes: dict[str, Any] = {
        "channels": config.channels,
        "num_heads": config.num_heads,
        "dropout": config.dropout,
    }
    return MaskedLayer(
        cross_attention=DenseAttention(**sizes),
        self_attention=SelfAttention(**sizes),
        feed_forward=feed_forward(config),
        channels=config.channels,
        dropout=config.dropout,
    )


def masked_attention_mask(mask: Tensor, padding: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn mask logits [B, Q, S] into an additive attention mask [B, 1, Q, S] (sec. 3.2.1).

    A query attends where its logits are >= 0 outside the padding [B, S], or everywhere if there is
    no such token.
    """
    is_visible = (mask >= 0) & ~padding[:, None]
    is_visible = is_visible | ~is_visible.any(-1, keepdim=True)
    return additive(is_visible, dtype)[:, None]


class MaskedDecoder(nn.Module):
    """Decoder with masked attention; predicts from the initial queries and after every layer.

    Args:
        position: padding of a level [B, h, w] -> positions [B, h, w, C].
    """

    def __init__(
        self,
        *,
        layers: list[MaskedLayer],
        position: nn.Module,
        heads: MaskHeads,
        channels: int,
        num_levels: int,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.position = position
        self.heads = heads
        self.num_levels = num_levels
        self.level_embedding = nn.Parameter(torch.randn(num_levels, channels))

    def forward(self, queries: Queries, memory: Memory) -> Predictions:
        """Decode to `decoder_layers` + 1 predictions with mask embeddings and without boxes."""
        content, position = queries.state.content, queries.state.position
        dtype = attention_dtype(content)
        query_mask = QueryAttentionMask(
            queries.segments, device=content.device, dtype=dtype, mask=queries.mask
        )
        levels = self.keys_and_values(memory)
        with torch.no_grad():
            maps = [mask_features_at(memory, level) for level in range(self.num_levels)]
        predictions, mask = [self.heads(content)], queries.state.reference
        for index, layer in enumerate(self.layers):
            level = level_of(index, self.num_levels)
            if index > 0:
                with torch.no_grad():
                    mask = mask_logits(predictions[-1][1], maps[level]).flatten(2)
            key, value, padding = levels[level]
            mask = masked_attention_mask(mask, padding, dtype)
            content = layer(content, position, key, value, padding, mask, query_mask)
            predictions.append(self.heads(content))
        logits, embeddings = zip(*predictions, strict=True)
        return Predictions(
            logits=torch.stack(logits),
            boxes=None,
            references=(None,) * (len(self.layers) + 1),
            segments=queries.segments,
            proposals=queries.proposals,
            mask_embeddings=torch.stack(embeddings),
            mask_features=memory.mask_features,
        )

    def keys_and_values(self, memory: Memory) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return keys [B, s, C], values [B, s, C] and padding [B, s] of every level."""
        sizes = [height * width for height, width in memory.shapes]
        tokens, paddings = memory.tokens.split(sizes, dim=1), memory.padding.split(sizes, dim=1)
        levels = []
        for level, (height, width) in enumerate(memory.shapes):
            value = tokens[level] + self.level_embedding[level]
            position = self.position(paddings[level].unflatten(1, (height, width)))
            levels.append((value + position.to(value.dtype), value, paddings[level]))
        return levels
