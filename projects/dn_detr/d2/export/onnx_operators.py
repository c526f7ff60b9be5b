"""What the compiled operators of this project are in ONNX. Needs onnxscript.

A graph is traced with the operators in it and translated here, so that ten nodes stand for one
level of one attention; traced through their plain PyTorch form it would be several times as large.
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
    """`ops.ms_deform_attn`; spatial_shapes [2 * levels]: h, w of each level."""
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
    """`ops.deformable_attention`; spatial_shapes [2 * levels]: h, w of each level."""
    levels, points = offsets.shape[3:5]
    grids = []
    for level in range(levels):
        place = op.Gather(reference, level, axis=2) if len(reference.shape) == 4 else reference
        place = op.Unsqueeze(place, [2, 3])  # [B, Q, 1, 1, 2 or 4]
        valid = op.Unsqueeze(op.Gather(valid_sizes, level, axis=1), [1, 2, 3])
        offset = op.Gather(offsets, level, axis=3)  # [B, Q, H, P, 2]
        if reference.shape[-1] == 2:
            cells = op.Add(op.Mul(place, valid), offset)
        else:
            centre, size = (op.Slice(place, [2 * i], [2 * i + 2], [4]) for i in (0, 1))
            offset = op.Mul(offset, op.Mul(size, 0.5 / points))
            cells = op.Mul(op.Add(centre, offset), valid)
        width_height = op.Gather(spatial_shapes, [2 * level + 1, 2 * level])
        sides = op.Cast(width_height, to=FLOAT32)
        grids.append(op.Sub(op.Mul(cells, op.Div(2.0, sides)), 1.0))
    kept = op.Where(op.Unsqueeze(padding, [2, 3]), 0.0, value)
    weights = op.Softmax(logits, axis=-1)
    return _sample(kept, value.shape[2:], spatial_shapes, grids, points, weights)


def _sample(value, width, spatial_shapes, grids, points, weights):
    """Weighted samples of all levels -> [B, Q, H * D].

    value [B, S, H, D], with width = (H, D); grids: for each level [B, Q, H, P, 2] in [-1, 1] from
    border to border; weights [B, Q, H, levels * P].
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
    """A shape of host integers and of sizes [1]."""
    return op.Concat(
        *(op.Constant(value_ints=[side]) if isinstance(side, int) else side for side in sides),
        axis=0,
    )


def translations() -> dict:
    """Operator -> its form in ONNX, for `torch.onnx.export`; empty where nothing is compiled."""
    forms = {"ms_deform_attn": ms_deform_attn, "deformable_attention": deformable_attention}
    ours = torch.ops.dn_detr
    return {
        getattr(ours, name).default: form for name, form in forms.items() if hasattr(ours, name)
    }


def simplify(model: onnx_ir.Model) -> None:
    """Compute what is constant and drop what nobody uses, in place.

    Of the rest of the exporter's optimiser, which takes minutes, runtimes do the same on loading. A
    CastLike of a float32 number changes nothing, as all numbers are float32; not every runtime has
    it.
    """
    optimizer.fold_constants(model)
    for node in model.graph:
        if node.op_type == "CastLike" and node.inputs[0].dtype == onnx_ir.DataType.FLOAT:
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
    optimizer.remove_unused_nodes(model)
