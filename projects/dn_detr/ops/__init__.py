"""Operators with C++/CUDA kernels and a reference implementation in PyTorch."""

from dn_detr.ops.deformable_attention import deformable_attention, deformable_attention_pytorch
from dn_detr.ops.extension import pytorch_operators
from dn_detr.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_pytorch
from dn_detr.ops.noise_objects import NoisedSlots, noise_objects, noise_objects_pytorch

__all__ = [
    "NoisedSlots",
    "deformable_attention",
    "deformable_attention_pytorch",
    "ms_deform_attn",
    "ms_deform_attn_pytorch",
    "noise_objects",
    "noise_objects_pytorch",
    "pytorch_operators",
]
