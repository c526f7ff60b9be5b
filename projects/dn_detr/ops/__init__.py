"""Operators of the project: a public function each, compiled where built, else plain PyTorch."""

from dn_detr.ops.deformable_attention import deformable_attention, deformable_attention_plain
from dn_detr.ops.extension import plain_operators
from dn_detr.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_plain
from dn_detr.ops.noise_objects import NoisedSlots, noise_objects, noise_objects_plain

__all__ = [
    "NoisedSlots",
    "deformable_attention",
    "deformable_attention_plain",
    "ms_deform_attn",
    "ms_deform_attn_plain",
    "noise_objects",
    "noise_objects_plain",
    "plain_operators",
]
