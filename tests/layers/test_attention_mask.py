"""The mask of decoder self-attention is made once a forward, in the form that attention takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dn_detr.layers.query_attention import QueryAttentionMask
from dn_detr.ops.extension import KERNELS
from dn_detr.structures import Segment

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
LAYERS, MATCHED = 3, 7


class Operators(TorchDispatchMode):
    """Collects what is called below autograd and autocast: `attended`, (query, mask or None) of
    each attention, and `made`, (operator, result) of each result that is no view."""

    def __init__(self):
        super().__init__()
        self.attended, self.made, self.storages = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in str(func):
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            mask = given.get("attn_mask", given.get("attn_bias"))
            self.attended.append((given["query"], mask))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage().data_ptr()
                if storage not in self.storages:
                    self.made.append((str(func), result))
                    self.storages.add(storage)
        return results


def train_forward(auxiliary, device, amp):
    """The operators of one forward with ground truth, and the number of queries that a mask joins:
    noised and matched ones."""
    model = tiny.tiny_model("dab_deformable", decoder_layers=LAYERS, **tiny.AUXILIARY[auxiliary])
    model = model.float().to(device)
    features = [feature.float().to(device) for feature in tiny.tiny_features(2)]
    padding = tiny.tiny_padding([(96, 128), (64, 80)]).to(device)
    targets = tiny.tiny_targets(2, 1)
    targets = replace(targets, boxes=targets.boxes.float()).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=amp), Operators() as operators:
        predictions = model(features, padding, targets)
    return operators, predictions.segment("dn").size + MATCHED


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("auxiliary", ["denoising", "contrastive", "denoising and groups"])
def test_all_layers_take_one_mask_as_it_was_made(auxiliary, device, amp):
    operators, total = train_forward(auxiliary, device, amp)
    masked = [(query, mask) for query, mask in operators.attended if mask is not None]
    assert len(masked) == LAYERS
    assert len({mask.data_ptr() for _, mask in masked}) == 1
    for query, mask in masked:
        assert query.dtype == mask.dtype == (torch.bfloat16 if amp else torch.float32)
        assert mask.shape[-2:] == (total, total)
        assert_aligned(mask)


def assert_aligned(mask):
    """Efficient attention on CUDA pads and copies masks whose rows are not aligned, every time."""
    assert mask.stride(-1) == 1 and mask.stride(-2) % 16 == 0


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("auxiliary", ["denoising", "contrastive", "denoising and groups"])
def test_only_the_noise_operator_makes_a_tensor_of_all_pairs(auxiliary, device, amp):
    if device not in KERNELS.get("noise_objects", ()):
        pytest.skip(f"no kernels for {device}")
    operators, total = train_forward(auxiliary, device, amp)
    makers = [name for name, made in operators.made if is_of_pairs(made.shape, total)]
    assert makers == ["dn_detr.noise_objects.default"]


def is_of_pairs(shape, total):
    """Whether [B, 1 or heads, total, total], or that with padded rows."""
    return len(shape) == 4 and shape[2] == total and total <= shape[3] < total + 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_folded", [False, True])
def test_masks_made_from_segments_are_aligned_too(is_folded, dtype):
    is_empty = torch.tensor([[False, True, True], [False, False, True]])
    first = Segment("dn", 3, attends_to=() if is_folded else ("match",), is_empty=is_empty)
    query_mask = QueryAttentionMask((first, Segment("match", 4)), device="cpu", dtype=dtype)
    mask = query_mask.parts[0][3]
    assert mask.dtype == dtype
    assert_aligned(mask)
