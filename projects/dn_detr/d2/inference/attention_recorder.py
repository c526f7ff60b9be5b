"""Where the decoder looks, layer by layer, recorded by hooks from outside of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dn_detr.layers.attention_blocks import DeformableAttention
from dn_detr.layers.row_column_attention import RowColumnAttention
from dn_detr.models.detection_transformer import DETR
from dn_detr.structures import Memory


@dataclass(frozen=True, eq=False)
class Samples:
    """Sampling points of deformable attention: locations [B, Q, H, levels, P, 2] in [0, 1] of the
    unpadded image, weights [B, Q, H, levels, P] that add up to 1 over levels and points."""

    locations: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Weights [B, Q, h, w] of a level's cells, averaged over the heads. valid_sizes [B, 2]: (w, h)
    of the unpadded part in cells."""

    level: int
    weights: Tensor
    valid_sizes: Tensor


@dataclass(eq=False)
class LayerLook:
    """What cross-attention of a decoder layer looked at: samples, or maps of one or more levels."""

    memory: Memory
    samples: list[Samples] = field(default_factory=list)
    maps: list[AttentionMap] = field(default_factory=list)

    def add_dense(self, weights: Tensor) -> None:
        """weights [B, H, Q, S] over all tokens, or over those of a level that has none yet."""
        shapes = self.memory.shapes
        sizes = [height * width for height, width in shapes]
        if weights.shape[-1] == sum(sizes):
            parts = list(enumerate(weights.split(sizes, dim=-1)))
        else:
            seen = [entry.level for entry in self.maps]
            fitting = [i for i, s in enumerate(sizes) if s == weights.shape[-1] and i not in seen]
            parts = [(fitting[0], weights)]
        for level, part in parts:
            part = part.mean(1).unflatten(-1, shapes[level])
            self.maps.append(AttentionMap(level, part, self.memory.valid_sizes[:, level]))


@contextmanager
def record(core: DETR) -> Iterator[list[LayerLook]]:
    """While it is open, a forward pass of `core` fills the list, with an entry for each decoder
    layer; empty looks where cross-attention is none that is known here."""
    looks: list[LayerLook] = []
    recorder = _Recorder(looks)
    with ExitStack() as stack:

        def hook(module: nn.Module, function, *, before: bool) -> None:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(function).remove)

        hook(core.decoder, recorder.enter_decoder, before=True)
        for layer in core.decoder.layers:
            hook(layer, recorder.enter_layer, before=True)
            hook(layer, recorder.leave_layer, before=False)
            hook(layer.self_attention, recorder.pause, before=True)
            hook(layer.self_attention, recorder.go_on, before=False)
            for module in layer.modules():
                if isinstance(module, DeformableAttention):
                    hook(module, recorder.see_deformable, before=True)
                elif isinstance(module, RowColumnAttention):
                    hook(module.dropout, recorder.see_row_or_column, before=False)
        stack.enter_context(recorder)
        yield looks


class _Recorder(TorchFunctionMode):
    """Fills looks; as a mode it sees every scaled_dot_product_attention."""

    def __init__(self, looks: list[LayerLook]):
        super().__init__()
        self.looks = looks
        self.is_recording = False
        self.memory: Memory | None = None
        self.columns: Tensor | None = None

    def enter_decoder(self, decoder, arguments) -> None:
        _, self.memory = arguments

    def enter_layer(self, layer, arguments) -> None:
        self.looks.append(LayerLook(self.memory))
        self.is_recording = True

    def leave_layer(self, layer, arguments, output) -> None:
        self.is_recording = False

    def pause(self, module, arguments) -> None:
        self.is_recording = False

    def go_on(self, module, arguments, output) -> None:
        self.is_recording = True

    def see_deformable(self, module: DeformableAttention, arguments) -> None:
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
        self.looks[-1].samples.append(Samples(reference[..., :2] + offsets, weights))

    def see_row_or_column(self, module, arguments, weights: Tensor) -> None:
        """Of one map: first the columns [B, H, Q, w], then the rows [B, H, Q, h]."""
        if self.columns is None:
            self.columns = weights
            return
        joint = weights[..., :, None] * self.columns[..., None, :]
        self.looks[-1].add_dense(joint.flatten(-2))
        self.columns = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and self.is_recording:
            query, key, mask = args[0], args[1], kwargs.get("attn_mask")
            scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
            self.looks[-1].add_dense(torch.softmax(scores if mask is None else scores + mask, -1))
        return function(*args, **kwargs)
