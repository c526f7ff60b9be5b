"""Inference of a detector as a function of tensors, traceable for any batch and size.

    images [B, 3, H, W] float32 in 0..255, each at the top left of its canvas
    sizes  [B, 2] int64: (height, width) of each image on its canvas
    -> boxes [B, k, 4] xyxy in [0, 1] of the image, scores [B, k], labels [B, k] int64, best first,
       and of a detector with masks: masks [B, k, h, w], logits over the canvas

Normalisation and top-k selection are included. Pixels outside the images have no effect.
"""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from dn_detr.d2.export.rcnn_graph import RCNNGraph
from dn_detr.d2.modeling.faster_rcnn import DenoisingRCNN
from dn_detr.d2.modeling.images import prepare
from dn_detr.d2.modeling.meta_arch import DenoisingDETR, core_of
from dn_detr.models.mask_postprocess import best_masks
from dn_detr.models.postprocess import best_detections

SIDE_STEP = 32
"""The coarsest stride of common backbones."""


class DETRGraph(nn.Module):
    """Inference of `DenoisingDETR`, with or without masks."""

    def __init__(self, model: DenoisingDETR):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Map images [B, 3, H, W] and sizes [B, 2] to detections; see the module's docstring."""
        model = self.model
        normalised, padding = prepare(model, images, sizes)
        features = model.backbone(normalised)
        predictions = model.core([features[name] for name in model.in_features], padding)
        best = {"top_k": model.top_k, "has_no_object": model.has_no_object}
        if model.has_masks:
            return best_masks(predictions, sizes, padding, **best)
        return best_detections(predictions, **best)


def graph_of(model: nn.Module) -> nn.Module:
    """Return the inference of a detector as a module; InputError for unknown models."""
    if isinstance(model, DenoisingRCNN):
        graph = RCNNGraph(model)
    else:
        core_of(model, "export")
        graph = DETRGraph(model)
    return graph.eval().requires_grad_(False)


def side_step(model: nn.Module) -> int:
    """Return the coarsest stride, which divides the sides of every canvas.

    For other sizes `torch.export` would fix the parity of each side after each strided layer.
    """
    if isinstance(model, DenoisingRCNN):
        shapes = model.backbone.output_shape()
        return max(shapes[name].stride for name in model.proposal_generator.in_features)
    return SIDE_STEP


def detections_of(model: nn.Module, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    """Return the detections of a model with the inputs and outputs of its graph.

    For a Faster R-CNN, whose graph reimplements its inference, these are Detectron2's, padded.

    Args:
        model: The detector.
        images: [B, 3, H, W] float32 in 0..255.
        sizes: [B, 2] int64, (height, width).
    """
    if not isinstance(model, DenoisingRCNN):
        return graph_of(model)(images, sizes)
    samples = [
        {"image": image[:, :height, :width]}
        for image, (height, width) in zip(images, sizes.tolist(), strict=True)
    ]
    count = model.roi_heads.box_predictor.test_topk_per_image
    found = [filled(one, count) for one in model.inference(samples, do_postprocess=False)]
    return tuple(torch.stack(values) for values in zip(*found, strict=True))


def filled(instances: Instances, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad detections with 0: boxes [count, 4] in [0, 1], scores [count], labels [count]."""
    height, width = instances.image_size
    boxes = instances.pred_boxes.tensor
    values = (
        boxes / boxes.new_tensor([width, height] * 2),
        instances.scores,
        instances.pred_classes,
    )
    missing = count - len(instances)
    return tuple(torch.cat((value, value.new_zeros(missing, *value.shape[1:]))) for value in values)
