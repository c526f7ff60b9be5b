"""Recording of the decoder's cross-attention by hooks, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dn_detr.layers.deformable_module import DeformableAttention
from dn_detr.layers.row_column_attention import RowColumnAttention
from dn_detr.models.detection_transformer import DETR
from dn_detr.structures import Memory


@dataclass(frozen=True, eq=False)
class Samples:
    """Sampling points of deformable attention with H heads and P points.

    Args:
        locations: [B, Q, H, levels, P, 2], (x, y) in [0, 1] of the unpadded image.
        weights: [B, Q, H, levels, P], with the sum 1 over levels and points.
    """

    locations: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Attention to the cells of a level, averaged over the heads.

    Args:
        level: Index of the level.
        weights: [B, Q, h, w].
        valid_sizes: [B, 2], (w, h) of the unpadded part in cells.
    """

    level: int
    weights: Tensor
    valid_sizes: Tensor


@dataclass(eq=False)
class LayerAttention:
    """Cross-attention of a decoder layer: sampling points, or maps of one or more levels.

    Args:
        memory: Memory of S tokens that the layer attends to.
        samples: Sampling points of deformable attention.
        maps: Maps of dense attention.
    """

    memory: Memory
    samples: list[Samples] = field(default_factory=list)
    maps: list[AttentionMap] = field(default_factory=list)

    def add_dense(self, weights: Tensor) -> None:
        """Add weights [B, H, Q, S] over all tokens, or over those of a level without a map yet."""
        shapes = self.memory.shapes
        sizes = [height * width for height, width in shapes]
        if weights.shape[-1] == sum(sizes):
            parts = list(enumerate(weights.split(sizes, dim=-1)))
        else:
            known = [entry.level for entry in self.maps]
            fitting = [i for i, s in enumerate(sizes) if s == weights.shape[-1] and i not in known]
            parts = [(fitting[0], weights)]
        for level, part in parts:
            part = part.mean(1).unflatten(-1, shapes[level])
            self.maps.append(AttentionMap(level, part, self.memory.valid_sizes[:, level]))


@contextmanager
def record_attention(core: DETR) -> Iterator[list[LayerAttention]]:
    """Record the cross-attention of forward passes inside the context.

    Yields:
        A list that each forward pass extends by one entry per decoder layer. Entries stay empty
        for unknown kinds of cross-attention.
    """
    layers: list[LayerAttention] = []
    recorder = _Recorder(layers)
    with ExitStack() as stack:

        def hook(module: nn.Module, function, *, before: bool) -> None:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(function).remove)

        hook(core.decoder, recorder.enter_decoder, before=True)
        for layer in core.decoder.layers:
            hook(layer, recorder.enter_layer, before=True)
            hook(layer, recorder.leave_layer, before=False)
            hook(layer.self_attention, recorder.pause, before=True)
            hook(layer.self_attention, recorder.resume, before=False)
            for module in layer.modules():
                if isinstance(module, DeformableAttention):
                    hook(module, recorder.record_deformable, before=True)
                elif isinstance(module, RowColumnAttention):
                    hook(module.dropout, recorder.record_row_or_column, before=False)
        stack.enter_context(recorder)
        yield layers


class _Recorder(TorchFunctionMode):
    """Fills a list of layers; as a mode it intercepts every scaled_dot_product_attention."""

    def __init__(self, layers: list[LayerAttention]):
        super().__init__()
        self.layers = layers
        self.is_recording = False
        self.memory: Memory | None = None
        self.columns: Tensor | None = None

    def enter_decoder(self, _decoder, arguments) -> None:
        _, self.memory = arguments

    def enter_layer(self, layer, arguments) -> None:
        self.layers.append(LayerAttention(self.memory))
        self.is_recording = True

    def leave_layer(self, _layer, _arguments, _output) -> None:
        self.is_recording = False

    def pause(self, _module, _arguments) -> None:
        self.is_recording = False

    def resume(self, module, arguments, output) -> None:
        self.is_recording = True

    def record_deformable(self, module: DeformableAttention, arguments) -> None:
        """Compute the sampling points from the inputs of the module."""
        query, reference, memory = arguments
        shape = (module.num_heads, module.num_levels, module.num_points)
        offsets = module.sampling_offsets(query).unflatten(-1, (*shape, 2))
        logits = module.attention_weights(query).unflatten(-1, (shape[0], -1))
        if reference.ndim == 3:
            reference = reference[:, :, None]
        reference = reference[:, :, None, :, None]  # [B, Q, 1, levels or 1, 1, 2 or 4]
        if reference.shape[-1] == 4:
            offsets = offsets * reference[..., 2:] * (0.5 / module.num_points)
        else:
            offsets = offsets / memory.valid_sizes[:, None, None, :, None]
        weights = logits.softmax(-1).unflatten(-1, shape[1:])
        self.layers[-1].samples.append(Samples(reference[..., :2] + offsets, weights))

    def record_row_or_column(self, module, arguments, weights: Tensor) -> None:
        """Join weights of columns [B, H, Q, w] with those of rows [B, H, Q, h], which follow."""
        if self.columns is None:
            self.columns = weights
            return
        joint = weights[..., :, None] * self.columns[..., None, :]
        self.layers[-1].add_dense(joint.flatten(-2))
        self.columns = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and self.is_recording:
            query, key, mask = args[0], args[1], kwargs.get("attn_mask")
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            self.layers[-1].add_dense(torch.softmax(scores if mask is None else scores + mask, -1))
        return function(*args, **kwargs)
