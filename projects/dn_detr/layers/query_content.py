"""What a query says before the first layer: learned rows for matched queries, label embeddings for
denoising ones. The label table exists only if an auxiliary query module asks for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QueryContent(nn.Module):
    """Content vectors of C channels.

    With labels and `has_indicator`, the last channel tells the parts apart: 1 for denoising, 0 for
    matched queries (2203.01305, sec. 4.3). Learned rows keep all C channels in the checkpoint, the
    last one being zero and unused, so that a denoised checkpoint loads into the plain model.

    The label table has one row more than there are classes: "unknown", for designs whose matched
    queries share one content (DN-DETR). A noised label is never "unknown".
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
        return self.label_embedding is not None

    def without_indicator(self) -> QueryContent:
        """The same without the indicator, for designs whose matched content is not a learned row of
        their own (its last channel would be lost)."""
        return QueryContent(
            channels=self.channels,
            num_classes=self.num_classes,
            has_labels=self.has_labels,
            has_indicator=False,
        )

    def new_rows(self, num_queries: int) -> nn.Parameter:
        """Rows [N, C] for `matched`, standard normal as in `nn.Embedding`."""
        rows = torch.randn(num_queries, self.channels)
        if self.has_indicator:
            rows[:, -1] = 0
        return nn.Parameter(rows)

    def matched(self, rows: Tensor) -> Tensor:
        """Content [N, C] of matched queries from their learned rows [N, C]."""
        return F.pad(rows[:, :-1], (0, 1)) if self.has_indicator else rows

    def labels(self, labels: Tensor) -> Tensor:
        """Content [B, T, C] of denoising queries from labels [B, T] int64."""
        if self.label_embedding is None:
            raise ValueError("this content was built without a label table")
        embedded = self.label_embedding(labels)
        return F.pad(embedded, (0, 1), value=1.0) if self.has_indicator else embedded


class SharedContent(nn.Module):
    """Content of matched queries without rows of their own: zero, or with `is_learned` one vector
    that all share, like the label "unknown" of DN-DETR (2203.01305, sec. 4.3).

    num_patterns P: each query is asked P times, each time with another learned pattern added, so
    that one place can answer for several objects (2109.07107, sec. 3.2); 0: once, without pattern.
    """

    def __init__(self, *, content: QueryContent, is_learned: bool, num_patterns: int):
        super().__init__()
        self.channels = content.channels
        self.row = content.new_rows(1) if is_learned else None
        self.patterns = (
            nn.Parameter(torch.randn(num_patterns, content.channels)) if num_patterns else None
        )

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [N, R] of the queries -> content [P * N, C] and their rows [P * N, R], pattern after
        pattern."""
        content = rows.new_zeros(rows.shape[0], self.channels)
        if self.row is not None:
            content = content + self.row
        if self.patterns is None:
            return content, rows
        content = content + self.patterns[:, None]
        return content.flatten(0, 1), rows.repeat(self.patterns.shape[0], 1)
