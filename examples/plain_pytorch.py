#!/usr/bin/env python
"""Train DN-Deformable-DETR in a plain PyTorch loop, without Detectron2.

    python examples/plain_pytorch.py --minutes 8 --output detections.png

The core takes backbone features and a padding mask. Everything else here is ordinary PyTorch: a
torchvision backbone, a folder of images in COCO format, AdamW, a loop.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from pycocotools.coco import COCO
from torch import nn
from torchvision.io import read_image
from torchvision.models import resnet18

from dn_detr.build import Denoising, LossConfig, build_model, make_config
from dn_detr.datasets.shapes import generate
from dn_detr.losses.matcher import Costs, assign
from dn_detr.models.postprocess import postprocess
from dn_detr.structures import Target, pad_targets


class Detector(nn.Module):
    """A backbone and the core of dn_detr."""

    def __init__(self, num_classes: int):
        super().__init__()
        net = resnet18(norm_layer=lambda width: nn.GroupNorm(16, width))
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1)
        self.stages = nn.ModuleList([net.layer2, net.layer3, net.layer4])
        self.core = build_model(
            "dab_deformable",
            make_config(
                "dab_deformable",
                num_classes=num_classes,
                num_queries=60,
                channels=96,
                num_heads=6,
                feed_forward_dim=256,
                encoder_layers=2,
                decoder_layers=3,
            ),
            in_channels=[128, 256, 512],
            strides=[8, 16, 32],
            denoising=Denoising(num_groups=10),  # None trains the plain detector
        )

    def forward(self, images, padding, targets=None):
        features, x = [], self.stem(images)
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return self.core(features, padding, targets)  # without targets: no denoising, no cost


def load(root: Path) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Load images [3, h, w] (normalized), labels [n], boxes [n, 4] cxcywh in [0, 1]."""
    coco, samples = COCO(root / "annotations.json"), []
    for image in coco.imgs.values():
        pixels = read_image(str(root / "images" / image["file_name"])).float() / 64 - 2
        objects = coco.imgToAnns[image["id"]]
        labels = torch.tensor([o["category_id"] - 1 for o in objects], dtype=torch.int64)
        x, y, w, h = torch.tensor([o["bbox"] for o in objects]).reshape(-1, 4).unbind(1)
        boxes = torch.stack((x + w / 2, y + h / 2, w, h), dim=1)
        scale = torch.tensor([image["width"], image["height"]] * 2)
        samples.append((pixels, labels, boxes / scale))
    return samples


def collate(samples: list, step: int):
    """Return the batch of images on one canvas, its padding mask, and the targets."""
    height = max(image.shape[1] for image, _, _ in samples)
    width = max(image.shape[2] for image, _, _ in samples)
    images = torch.zeros(len(samples), 3, height, width)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    targets = []
    for i, (image, labels, boxes) in enumerate(samples):
        h, w = image.shape[1:]
        images[i, :, :h, :w] = image
        padding[i, :h, :w] = False
        # The noise follows from this key: another one for every image and step.
        targets.append(Target(labels, boxes, noise_seed=step * len(samples) + i))
    return images, padding, pad_targets(targets)


def draw(model: Detector, samples: list, output: Path) -> None:
    figure, axes = plt.subplots(2, 4, figsize=(12, 6), constrained_layout=True)
    model.eval()
    for axis, (image, _labels, boxes) in zip(axes.flat, samples, strict=False):
        height, width = image.shape[1:]
        with torch.no_grad():
            predictions = model(image[None], torch.zeros(1, height, width, dtype=torch.bool))
        (found,) = postprocess(predictions, [(height, width)], top_k=60)
        axis.imshow((image.permute(1, 2, 0) + 2) / 4)
        truth = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1)
        truth = truth * torch.tensor([width, height] * 2)
        for color, corners in (("white", truth), ("red", found.boxes_xyxy_px[found.scores > 0.4])):
            for x0, y0, x1, y1 in corners.tolist():
                axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=color))
        axis.axis("off")
    figure.suptitle("white: ground truth, red: detections")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=Path, default=Path("datasets"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, default=Path("detections.png"))
    args = parser.parse_args()
    train, val = (load(generate(args.datasets, split)) for split in ("train", "val"))
    torch.manual_seed(0)
    model = Detector(num_classes=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-4, weight_decay=1e-4)
    criterion, costs = LossConfig(class_weight=2.0).criterion(), Costs()
    end, step = time.monotonic() + 60 * args.minutes, 0
    while time.monotonic() < end:
        picked = torch.randint(len(train), (4,)).tolist()
        images, padding, targets = collate([train[i] for i in picked], step)
        predictions = model(images, padding, targets)
        assignments = assign(predictions, targets, costs)
        losses = criterion(predictions, targets, assignments, max(1, sum(targets.counts)))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {sum(losses.values()).item():.3f}", flush=True)
        step += 1
    draw(model, val[:8], args.output)
    print(f"wrote {args.output} after {step} steps")


if __name__ == "__main__":
    main()
