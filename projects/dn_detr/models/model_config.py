"""The numbers of a model: what a configuration file may set. Pages read those that they need."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a detector. Defaults are those of the published 50-epoch models.

    epsilon: how close to 0 and 1 a coordinate may come before its logit is cut off.
    scales_with_canvas: see `models.decoder.BoxPosition`.
    num_patterns, shares_content: see `layers.content.SharedContent`, `num_patterns` and
    `is_learned`.
    has_no_object: the logits have a last column for "no object", as a softmax over classes needs.
    encoder_feed_forward_dim: of the encoder's layers; 0: feed_forward_dim.
    """

    num_classes: int
    num_queries: int = 300
    channels: int = 256
    num_heads: int = 8
    num_levels: int = 4
    num_points: int = 4
    feed_forward_dim: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.0
    epsilon: float = 1e-3
    scales_with_canvas: bool = False
    num_patterns: int = 0
    shares_content: bool = False
    has_no_object: bool = False
    encoder_feed_forward_dim: int = 0

    def __post_init__(self):
        for name in ("num_classes", "num_queries", "channels", "num_heads", "num_levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.decoder_layers < 1 or self.encoder_layers < 0:
            raise ValueError(
                "decoder_layers must be at least 1 and encoder_layers at least 0, got "
                f"{self.decoder_layers} and {self.encoder_layers}"
            )
        if self.channels % self.num_heads or self.channels % 8:
            raise ValueError(
                f"channels must be a multiple of 8 and of num_heads {self.num_heads}, "
                f"got {self.channels}"
            )

    @property
    def num_logits(self) -> int:
        """Columns of the logits."""
        return self.num_classes + self.has_no_object
