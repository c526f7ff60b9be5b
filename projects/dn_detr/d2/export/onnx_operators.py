"""ONNX translations of this project's compiled operators. Needs onnxscript.

A graph is traced with these operators and translated here to ten nodes per level of an attention.
Traced through the PyTorch reference implementations it would be several times larger.
"""

from __future__ import annotations

import onnx_ir
import torch
from onnxscript import BOOL, FLOAT, INT64, optimizer
from onnxscript.onnx_opset import opset18 as op

FLOAT32 = 1
"""`onnx.TensorProto.FLOAT`."""


def ms_deform_attn(
    value: FLOAT, spatial_shapes: INT64, sampling_locations: FLOAT, attention_weights: FLOAT
) -> FLOAT:
    """Translate `ops.ms_deform_attn`; spatial_shapes [2 * levels]: (h, w) of each level."""
    levels, points = sampling_locations.shape[3:5]
    grids = [
        op.Sub(op.Mul(op.Gather(sampling_locations, level, axis=3), 2.0), 1.0)
        for level in range(levels)
    ]
    weights = op.Reshape(attention_weights, [0, 0, 0, levels * points])
    return _sample(value, value.shape[2:], spatial_shapes, grids, points, weights)


def deformable_attention(
    value: FLOAT,
    spatial_shapes: INT64,
    valid_sizes: FLOAT,
    reference: FLOAT,
    offsets: FLOAT,
    logits: FLOAT,
    padding: BOOL,
) -> FLOAT:
    """Translate `ops.deformable_attention`; spatial_shapes [2 * levels]: (h, w) of each level."""
    levels, points = offsets.shape[3:5]
    grids = []
    for level in range(levels):
        box = op.Gather(reference, level, axis=2) if len(reference.shape) == 4 else reference
        box = op.Unsqueeze(box, [2, 3])  # [B, Q, 1, 1, 2 or 4]
        valid = op.Unsqueeze(op.Gather(valid_sizes, level, axis=1), [1, 2, 3])
        offset = op.Gather(offsets, level, axis=3)  # [B, Q, H, P, 2]
        if reference.shape[-1] == 2:
            cells = op.Add(op.Mul(box, valid), offset)
        else:
            centre, size = (op.Slice(box, [2 * i], [2 * i + 2], [4]) for i in (0, 1))
            offset = op.Mul(offset, op.Mul(size, 0.5 / points))
            cells = op.Mul(op.Add(centre, offset), valid)
        width_height = op.Gather(spatial_shapes, [2 * level + 1, 2 * level])
        sides = op.Cast(width_height, to=FLOAT32)
        grids.append(op.Sub(op.Mul(cells, op.Div(2.0, sides)), 1.0))
    kept = op.Where(op.Unsqueeze(padding, [2, 3]), 0.0, value)
    weights = op.Softmax(logits, axis=-1)
    return _sample(kept, value.shape[2:], spatial_shapes, grids, points, weights)


def _sample(value, width, spatial_shapes, grids, points, weights):
    """Sum weighted samples of value [B, S, H, D], width = (H, D), to [B, Q, H * D].

    grids has [B, Q, H, P, 2] in [-1, 1] for each level, weights are [B, Q, H, levels * P].
    """
    heads, channels = width
    tokens, queries = op.Shape(value, start=1, end=2), op.Shape(weights, start=1, end=2)
    value = op.Reshape(op.Transpose(value, perm=[0, 2, 3, 1]), _shape(-1, channels, tokens))
    samples, start = [], op.Constant(value_ints=[0])
    for level, grid in enumerate(grids):
        height, width = (op.Gather(spatial_shapes, [2 * level + i]) for i in (0, 1))
        end = op.Add(start, op.Mul(height, width))
        image = op.Slice(value, start, end, [2])
        image = op.Reshape(image, _shape(-1, channels, height, width))  # [B * H, D, h, w]
        grid = op.Reshape(op.Transpose(grid, perm=[0, 2, 1, 3, 4]), _shape(-1, queries, points, 2))
        samples.append(
            op.GridSample(image, grid, align_corners=0, mode="bilinear", padding_mode="zeros")
        )  # [B * H, D, Q, P]
        start = end
    weights = op.Transpose(weights, perm=[0, 2, 1, 3])
    weights = op.Reshape(weights, _shape(-1, 1, queries, points * len(grids)))
    mixed = op.ReduceSum(op.Mul(op.Concat(*samples, axis=-1), weights), [-1], keepdims=0)
    mixed = op.Reshape(mixed, _shape(-1, heads * channels, queries))
    return op.Transpose(mixed, perm=[0, 2, 1])


def _shape(*sides):
    """Concatenate host integers and sizes [1] to a shape."""
    return op.Concat(
        *(op.Constant(value_ints=[side]) if isinstance(side, int) else side for side in sides),
        axis=0,
    )


def translations() -> dict:
    """Return compiled operator -> translation, for `torch.onnx.export`."""
    forms = {"ms_deform_attn": ms_deform_attn, "deformable_attention": deformable_attention}
    ours = torch.ops.dn_detr
    return {
        getattr(ours, name).default: form for name, form in forms.items() if hasattr(ours, name)
    }


def simplify(model: onnx_ir.Model) -> None:
    """Fold constants and remove unused nodes, in place.

    Runtimes do the remaining optimizations on loading, which take minutes in the exporter. CastLike
    of float32 is removed: all values are float32, and some runtimes do not support it.
    """
    optimizer.fold_constants(model)
    for node in model.graph:
        if node.op_type == "CastLike" and node.inputs[0].dtype == onnx_ir.DataType.FLOAT:
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
    optimizer.remove_unused_nodes(model)
