"""Hyper-parameters of the methods: defaults are those of the published 50-epoch models.

Each method file declares a dataclass of the hyper-parameters that it reads, made of the ones here.
The keys of MODEL.DN_DETR are generated from these dataclasses (`d2.config.fields`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every method reads."""

    num_classes: int
    # Number of matched queries, the most detections that an image can have.
    num_queries: int = 300
    # Width of tokens and queries.
    channels: int = 256
    num_heads: int = 8
    feed_forward_dim: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.0
    # Whether logits have a last column for "no object", as a softmax over classes needs.
    has_no_object: bool = False
    # Treat padding as the authors' code does, so that results depend on the padding of the batch:
    # see `models.published`. Evaluation sets it for converted weights.
    as_published: bool = False

    def __post_init__(self) -> None:
        for name in ("num_classes", "num_queries", "channels", "num_heads"):
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
        """Number of class logits, "no object" included."""
        return self.num_classes + self.has_no_object


@dataclass(frozen=True, kw_only=True)
class BoxConfig(ModelConfig):
    """Methods whose queries predict boxes."""

    # Distance to 0 and 1 at which a coordinate's logit is cut off.
    epsilon: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class LevelsConfig(ModelConfig):
    """Methods with several feature levels."""

    # Feature levels: those of the backbone, then strided convolutions of the last.
    num_levels: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {self.num_levels}")


@dataclass(frozen=True, kw_only=True)
class MultiScaleConfig(LevelsConfig):
    """Methods of the Deformable DETR family."""

    # Sampling points of deformable attention, for each head and level.
    num_points: int = 4
    # Of the encoder's layers; 0: feed_forward_dim.
    encoder_feed_forward_dim: int = 0


@dataclass(frozen=True, kw_only=True)
class DeformableConfig(BoxConfig, MultiScaleConfig):
    """Methods of the Deformable DETR family whose queries predict boxes."""


@dataclass(frozen=True, kw_only=True)
class PatternConfig(BoxConfig):
    """Methods that may query each anchor with several learned patterns (2109.07107, sec. 3.2)."""

    # Learned patterns; there are num_queries x num_patterns matched queries. 0: no patterns.
    num_patterns: int = 0


@dataclass(frozen=True, kw_only=True)
class SharedContentConfig(PatternConfig):
    """Methods of DAB-DETR's query design."""

    # Matched queries start from one shared learned vector, as DN-DETR's label "unknown"
    # (2203.01305, sec. 4.3), instead of zero.
    shares_content: bool = False
