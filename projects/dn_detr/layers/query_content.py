"""Initial query content: learned for matched queries, label embeddings for denoising queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QueryContent(nn.Module):
    """Content embeddings of matched and denoising queries (2203.01305, sec. 4.3).

    Learned embeddings keep all C channels in the checkpoint, the indicator channel being zero and
    unused, so that a checkpoint trained with denoising loads into a model without it.

    Args:
        num_classes: K. The label embedding has an extra row, "unknown", for designs whose matched
            queries share one content (DN-DETR). A noised label is never "unknown".
        has_labels: Create the label embedding, which only auxiliary queries need.
        has_indicator: Use the last channel as an indicator, if there are labels: 1 for denoising
            queries, 0 for matched queries.
    """

    def __init__(self, *, channels: int, num_classes: int, has_labels: bool, has_indicator: bool):
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        self.has_indicator = has_labels and has_indicator
        width = channels - 1 if self.has_indicator else channels
        self.label_embedding = nn.Embedding(num_classes + 1, width) if has_labels else None

    @property
    def has_labels(self) -> bool:
        """Whether there is a label embedding."""
        return self.label_embedding is not None

    def without_indicator(self) -> QueryContent:
        """Create a copy without indicator, which would overwrite the last channel of content that
        is not a learned embedding per query.
        """
        return QueryContent(
            channels=self.channels,
            num_classes=self.num_classes,
            has_labels=self.has_labels,
            has_indicator=False,
        )

    def new_rows(self, num_queries: int) -> nn.Parameter:
        """Create embeddings [N, C] for `matched`, standard normal as in `nn.Embedding`."""
        rows = torch.randn(num_queries, self.channels)
        if self.has_indicator:
            rows[:, -1] = 0
        return nn.Parameter(rows)

    def matched(self, rows: Tensor) -> Tensor:
        """Return the content [N, C] of matched queries from their embeddings [N, C]."""
        return without_indicator(rows, self.has_indicator)

    def labels(self, labels: Tensor) -> Tensor:
        """Return the content [B, T, C] of denoising queries from labels [B, T] int64."""
        if self.label_embedding is None:
            raise ValueError("this QueryContent was built without a label embedding")
        embedded = self.label_embedding(labels)
        return F.pad(embedded, (0, 1), value=1.0) if self.has_indicator else embedded


def without_indicator(rows: Tensor, has_indicator: bool) -> Tensor:
    """Return rows [N, C] with a constant 0 as the last channel, if it is an indicator."""
    return F.pad(rows[:, :-1], (0, 1)) if has_indicator else rows


class SharedContent(nn.Module):
    """Content that all matched queries share.

    Args:
        is_learned: Learn the embedding, like the label "unknown" of DN-DETR (2203.01305, sec. 4.3);
            else it is zero.
        num_patterns: P. Each reference is used by P queries with different learned patterns, so
            that it can predict several objects (2109.07107, sec. 3.2); 0 disables patterns.
    """

    def __init__(self, *, content: QueryContent, is_learned: bool, num_patterns: int):
        super().__init__()
        self.channels = content.channels
        self.has_indicator = content.has_indicator
        self.row = content.new_rows(1) if is_learned else None
        self.patterns = (
            nn.Parameter(torch.randn(num_patterns, content.channels)) if num_patterns else None
        )

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return content [P * N, C] and repeated rows [P * N, R] from rows [N, R], pattern-major.

        Without patterns P is 1.
        """
        content = rows.new_zeros(rows.shape[0], self.channels)
        if self.row is not None:
            content = content + without_indicator(self.row, self.has_indicator)
        if self.patterns is None:
            return content, rows
        content = content + self.patterns[:, None]
        return content.flatten(0, 1), rows.repeat(self.patterns.shape[0], 1)
