#!/usr/bin/env python
"""Parameters and GFLOPs of configurations, without running or downloading anything.

    python tools/analyze_model.py --config-file configs/dn_detr.yaml
    python tools/analyze_model.py --config-file configs/*.yaml --size 800 1066

A multiply-add counts as one operation, as in the papers. They average over the first 100 images of
COCO val2017, about 800x1066 pixels; the default size here is the largest, 800x1333. The model runs on
tensors without data, so that this takes seconds and no memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from detectron2.modeling import build_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dn_detr.d2.config import read_config

PUBLISHED = {
    "dab_detr": (44, 94),
    "dab_detr_dc5": (44, 202),
    "dn_detr": (44, 94),
    "dn_detr_r101": (63, 174),
    "dn_detr_dc5": (44, 202),
    "dn_detr_dc5_r101": (63, 282),
    "conditional_detr": (44, 90),
    "dn_deformable": (48, 195),
}
"""Millions of parameters and GFLOPs: 2203.01305, tables 1 and 4; 2108.06152, table 1."""


def count_sampling(value, spatial_shapes, locations, weights, *args, out_shape=None, **kwargs) -> int:
    """Multiply-adds of deformable attention: 4 corners of every channel of every sample, and its
    weight. Arguments are shapes."""
    samples = 1
    for size in weights:
        samples *= size
    return 2 * samples * value[-1] * 5


def count_attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Two matrix products of scaled_dot_product_attention. Arguments are shapes."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def analyze(config_file: str, size: tuple[int, int]) -> tuple[float, float, float]:
    """(millions of parameters, those that train, GFLOPs) of inference on one image of `size`."""
    cfg = read_config(config_file, [])
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    if cfg.MODEL.DN_DETR.NUM_CLASSES == 0:
        cfg.MODEL.DN_DETR.NUM_CLASSES = 80
    model = build_model(cfg).eval()
    # What only training uses is left out, as in published counts.
    parameters = [p for name, p in model.named_parameters() if "assists." not in name]
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    model.requires_grad_(False)  # the counter cannot track learned rows that go into a module
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.zeros(1, 3, *size)
        padding = torch.zeros(1, *size, dtype=torch.bool)
        counter = FlopCounterMode(
            display=False,
            custom_mapping={
                torch.ops.dn_detr.ms_deform_attn: count_sampling,
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention,
            },
        )
        with counter:
            features = model.backbone(image)
            model.core([features[name] for name in model.in_features], padding)
    return total / 1e6, trained / 1e6, counter.get_total_flops() / 2e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", nargs="+", required=True)
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1333), metavar=("H", "W"))
    args = parser.parse_args()
    height, width = args.size
    print(f"| configuration | parameters (M) | trained (M) | GFLOPs at {height}x{width} | published |")
    print("|---|---|---|---|---|")
    for file in args.config_file:
        name = Path(file).stem
        if name.startswith("Base"):
            continue
        total, trained, flops = analyze(file, (height, width))
        published = "{}M / {}".format(*PUBLISHED[name]) if name in PUBLISHED else ""
        print(f"| {name} | {total:.1f} | {trained:.1f} | {flops:.1f} | {published} |", flush=True)


if __name__ == "__main__":
    main()
