"""Mask DINO: DINO with a mask for every box.

Feng Li et al., "Mask DINO: Towards A Unified Transformer-based Framework for Object Detection and
Segmentation", 2206.02777.

What differs from DINO:
 - a mask branch (sec. 3.2): every query also predicts a mask embedding; its mask is the product of
   the embedding and the mask features (`models.mask_head`);
 - unified query selection (3.3): the best encoder tokens give content and boxes of the queries, and
   their masks are trained; they share the heads of the decoder;
 - mask-enhanced box initialisation (3.3): the initial box of a query encloses its first mask;
 - predictions are also made and trained before the first layer;
 - hybrid matching (3.4): matching costs of classes, boxes and masks;
 - unified denoising (3.3): non-contrastive noise on boxes and labels; masks are reconstructed too.

Deviations from the authors' code: padding tokens and tokens at the image border never become
queries (theirs can); the box around a first mask holds all of it (theirs: but for the last row and
column), and a query whose first mask is empty keeps its proposed box (theirs: a corner); empty
denoising queries are masked and are not negatives; images with more objects than the budget noise a
random subset (theirs skips denoising); see also `losses.mask_points`. As in their code but not
their paper, the coarsest level proposes the smallest boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dn_detr.layers.box_ops import at_least_float32, keep_inside
from dn_detr.layers.position_encoding import SinePosition
from dn_detr.layers.query_content import QueryContent
from dn_detr.models.decoder import Decoder
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.mask_head import MaskHead, MaskHeads, boxes_of_masks, mask_logits
from dn_detr.models.model_config import DeformableConfig, ModelConfig
from dn_detr.models.multi_scale import decoder_layer, deformable_encoder, multi_scale_neck
from dn_detr.models.neck import Flatten
from dn_detr.models.prediction_heads import box_head, refine_box
from dn_detr.models.proposals import (
    SMALLEST_COORDINATE,
    ProposalParameters,
    best_tokens,
    check_ranking,
    token_boxes,
)
from dn_detr.models.query_positions import BoxPosition
from dn_detr.structures import LayerOutput, Memory, Predictions, Queries, QueryState, Segment


def mask_dino(
    config: DeformableConfig, in_channels: list[int], strides: list[int], content: QueryContent
) -> DETR:
    """Build Mask DINO. The first backbone feature is used for the mask features only."""
    c = config
    heads = Heads(c)
    return DETR(
        neck=multi_scale_neck(c, in_channels[1:], strides[1:]),
        flatten=Flatten(
            position=SinePosition(channels=c.channels, temperature=10000.0, cell_offset=0.0),
            channels=c.channels,
            num_levels=c.num_levels,
        ),
        encoder=deformable_encoder(c),
        query_design=TokenQueries(
            content=content.without_indicator(),
            num_queries=c.num_queries,
            heads=heads,
            has_no_object=c.has_no_object,
            epsilon=c.epsilon,
        ),
        decoder=Decoder(
            layers=[decoder_layer(c) for _ in range(c.decoder_layers)],
            position=BoxPosition(
                channels=c.channels,
                scales_with_content=False,
            ),
            predictor=IterativeRefinementWithMasks(heads=heads, epsilon=c.epsilon),
        ),
        mask_head=MaskHead(in_channels=in_channels[0], channels=c.channels),
    )


class Heads(MaskHeads):
    """Heads for class, mask embedding and box, shared by decoder queries and proposals."""

    def __init__(self, config: ModelConfig):
        super().__init__(
            channels=config.channels,
            num_classes=config.num_classes,
            has_no_object=config.has_no_object,
        )
        self.box_head = box_head(config.channels)

    def delta(self, content: Tensor) -> Tensor:
        """Predict box offsets [B, Q, 4] in logit space from content [B, Q, C]."""
        return at_least_float32(self.box_head(content))


class TokenHead(nn.Module):
    """Project encoder tokens to proposals, which the heads then classify and refine."""

    as_published = False
    """Padding and border tokens make proposals too, see `models.proposals.ProposalHead`."""

    def __init__(self, channels: int):
        super().__init__()
        self.project = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens [B, S, C], their anchor boxes [B, S, 4] and is_empty [B, S] bool."""
        levels = [level for level, _ in enumerate(memory.shapes)]
        anchors, is_empty = token_boxes(memory, levels[::-1])
        tokens = self.norm(self.project(memory.tokens.masked_fill(is_empty[..., None], 0)))
        if self.as_published:
            return tokens, anchors.masked_fill(is_empty[..., None], 1), torch.zeros_like(is_empty)
        return tokens, anchors, is_empty


class TokenQueries(nn.Module):
    """Unified query selection (sec. 3.3): the best encoder tokens become queries, without gradient.

    Args:
        heads: shared with the decoder; a checkpoint contains them twice.
        has_no_object: must be False, see `check_ranking`.
        epsilon: of `keep_inside`, for boxes of auxiliary queries.
    """

    starts_from_masks = False
    as_published = False
    """Boxes around masks as "mask2box" makes them: without the last row and column, and in the
    lower right corner for empty masks."""

    def __init__(
        self,
        *,
        content: QueryContent,
        num_queries: int,
        heads: Heads,
        has_no_object: bool,
        epsilon: float,
    ):
        super().__init__()
        check_ranking(has_no_object)
        self.content = content
        self.heads = heads
        self.epsilon = epsilon
        self.learned = self.new_parameters(num_queries)

    def new_parameters(self, num_queries: int, own_head: bool = True) -> ProposalParameters:
        """Make the parameters of extra queries."""
        head = TokenHead(self.content.channels) if own_head else None
        return ProposalParameters(num_queries=num_queries, content=None, head=head)

    def bind(self, memory: Memory) -> TokenSource:
        """Return the source of queries for one forward pass."""
        return TokenSource(self, memory)


class TokenSource:
    """Queries of `TokenQueries` for one forward pass."""

    def __init__(self, design: TokenQueries, memory: Memory):
        self.design = design
        self.memory = memory
        self.found = design.learned.head(memory)

    def queries(self, learned: ProposalParameters | None = None, first_rank: int = 0) -> Queries:
        """Make one "match" segment from the tokens ranked `first_rank` and below.

        Args:
            learned: parameters whose head ranks the tokens (default: those of the design).
            first_rank: rank of the first token to take.

        Returns:
            The queries; with proposals only if `learned` has its own head.
        """
        heads = self.design.heads
        learned = self.design.learned if learned is None else learned
        found = self.found
        if learned.head not in (None, self.design.learned.head):
            found = learned.head(self.memory)
        tokens, anchors, is_empty = found
        scores = at_least_float32(heads.class_head(tokens)).amax(-1).detach()
        index, is_empty = best_tokens(scores, is_empty, first_rank, learned.num_queries)
        tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))
        anchors = anchors.gather(1, index[..., None].expand(-1, -1, 4))
        boxes = refine_box(anchors, heads.delta(tokens), SMALLEST_COORDINATE)
        boxes = torch.where(anchors == 1, 1.0, torch.where(is_empty[..., None], 0.5, boxes))
        logits, embeddings = heads(tokens)
        proposals = Predictions(
            logits=logits[None],
            boxes=boxes[None],
            references=(None,),
            segments=(Segment("match", learned.num_queries, is_empty=is_empty),),
            mask_embeddings=embeddings[None],
            mask_features=self.memory.mask_features,
        )
        return Queries(
            state=QueryState(tokens.detach(), None, self._boxes_around_masks(embeddings, boxes)),
            segments=proposals.segments,
            proposals=None if learned.head is None else proposals,
        )

    def _boxes_around_masks(self, embeddings: Tensor, boxes: Tensor) -> Tensor:
        """Boxes [B, Q, 4] around the masks, `boxes` for empty masks, without gradient."""
        mask_features, epsilon = self.memory.mask_features, self.design.epsilon
        with torch.no_grad():
            masks = mask_logits(embeddings, mask_features.features)
            is_theirs = self.design.as_published
            around, is_empty = boxes_of_masks(masks, mask_features.valid_sizes, 1 - is_theirs)
            if is_theirs:
                corner = torch.ones_like(boxes[..., :2])
                boxes = torch.cat((corner, torch.zeros_like(corner)), dim=-1)
            around = torch.where(is_empty[..., None], boxes, around.to(boxes.dtype))
            return keep_inside(around, epsilon)

    def from_boxes(self, labels: Tensor, boxes: Tensor) -> QueryState:
        """Make queries from labels [B, T] int64 and boxes [B, T, 4]."""
        boxes = keep_inside(boxes, self.design.epsilon)
        return QueryState(self.design.content.labels(labels), None, boxes)


class IterativeRefinementWithMasks(nn.Module):
    """Box refinement of DINO with masks and a prediction before the first layer.

    Follows `models.prediction_heads.IterativeRefinement` with a norm, looking forward twice. As in
    the authors' code, the features for class and mask heads pass through the same norm twice.
    """

    def __init__(self, *, heads: Heads, epsilon: float):
        super().__init__()
        self.heads = heads
        self.epsilon = epsilon

    def start(self, content: Tensor, reference: Tensor) -> LayerOutput:
        """Predict from content [B, Q, C]; the boxes are the references [B, Q, 4]."""
        logits, embeddings = self.heads(content)
        return LayerOutput(logits, reference, reference, reference, mask_embeddings=embeddings)

    def forward(self, layer: int, content: Tensor, previous: LayerOutput) -> LayerOutput:
        """Predict from the content [B, Q, C] of a decoder layer."""
        heads, normed = self.heads, self.heads.norm(content)
        logits, embeddings = heads(normed)
        moved = refine_box(previous.reference, heads.delta(content), self.epsilon)
        return LayerOutput(
            logits=logits,
            boxes=refine_box(previous.base, heads.delta(normed), self.epsilon),
            reference=moved.detach(),
            base=moved,
            mask_embeddings=embeddings,
        )
