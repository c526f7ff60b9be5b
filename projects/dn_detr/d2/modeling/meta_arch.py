"""The Detectron2 meta-architecture: list[dict] in, losses or Instances out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.utils import comm
from torch import Tensor, nn

from dn_detr.auxiliary.box_prompts import add_prompts
from dn_detr.d2.data.catalog import with_num_classes
from dn_detr.d2.modeling.batch import Batch, BatchStats, batch_stats
from dn_detr.d2.modeling.from_config import core_from, losses_from
from dn_detr.d2.modeling.frozen_norm import join_frozen_norms
from dn_detr.d2.modeling.images import pad_images
from dn_detr.d2.modeling.instances import (
    IterationCounter,
    teacher_targets,
    to_instances,
    to_targets,
)
from dn_detr.d2.modeling.low_precision import call_in_autocast
from dn_detr.d2.modeling.prompts import classify_prompts, prompts_from
from dn_detr.errors import InputError
from dn_detr.losses.criterion import Criterion
from dn_detr.losses.matcher import assign, find_nonfinite
from dn_detr.losses.matching_costs import MatchingCosts
from dn_detr.losses.teacher_loss import Teaching
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.mask_postprocess import postprocess_masks
from dn_detr.models.postprocess import postprocess
from dn_detr.structures import Predictions


@META_ARCH_REGISTRY.register()
class DenoisingDETR(nn.Module):
    """Any method of `dn_detr.methods` on a Detectron2 backbone.

    Input is Detectron2's list of dicts: "image" [3, H, W] in 0..255, "instances" in training
    (gt_boxes, gt_classes; gt_masks for methods with masks), the output size "height" and "width",
    "teacher_instances" with `teaching` (gt_boxes, gt_classes, scores), and in evaluation optionally
    "prompts" (`prompts_from`).

    Output is a dict of scalar losses in training, and in evaluation a list of {"instances":
    pred_boxes in pixels of the output size, scores, pred_classes, with masks pred_masks bool
    [N, height, width]}; with prompts also "prompts": their pred_classes and scores.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        in_features: list[str],
        core: DETR,
        size_divisibility: int,
        costs: MatchingCosts,
        criterion: Criterion,
        num_classes: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        top_k: int,
        has_no_object: bool,
        pad_objects_to: int,
        seed: int,
        method: str,
        input_format: str,
        teaching: Teaching | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.in_features = in_features
        self.core = core
        self.has_masks = core.mask_head is not None
        self.size_divisibility = size_divisibility
        self.costs = costs
        self.criterion = criterion
        self.num_classes = num_classes
        self.top_k = top_k
        self.has_no_object = has_no_object
        self.pad_objects_to = pad_objects_to
        self.seed = seed
        self.method = method
        self.input_format = input_format
        self.teaching = teaching
        self.iterations = IterationCounter()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean)[:, None, None], False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std)[:, None, None], False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        cfg = with_num_classes(cfg)
        backbone = build_backbone(cfg)
        join_frozen_norms(backbone)
        node, shapes = cfg.MODEL.DN_DETR, backbone.output_shape()
        core, (costs, criterion, teaching) = core_from(cfg, shapes), losses_from(cfg)
        size_divisibility = backbone.size_divisibility
        if core.mask_head is not None:
            # Cells of all levels then cover whole cells of the map that masks are made of.
            size_divisibility = max(size_divisibility, shapes[node.IN_FEATURES[-1]].stride)
        return {
            "backbone": backbone,
            "in_features": list(node.IN_FEATURES),
            "core": core,
            "size_divisibility": size_divisibility,
            "costs": costs,
            "criterion": criterion,
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "top_k": cfg.TEST.DETECTIONS_PER_IMAGE,
            "has_no_object": node.LOSS.KIND == "softmax",
            "pad_objects_to": node.PAD_OBJECTS_TO,
            "method": node.METHOD,
            "input_format": cfg.INPUT.FORMAT,
            "seed": cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
            "teaching": teaching,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self,
        batched_inputs: list[dict],
        stats: BatchStats | None = None,
        iteration: int | None = None,
    ) -> dict[str, Tensor] | list[dict]:
        """Return losses in training, detections in evaluation.

        Args:
            batched_inputs: see the class.
            stats: of the batch that these samples are a part of, in training; None: they are all of
                it.
            iteration: from which, with seed and image id, the noise of training follows; None: the
                model counts its forward passes in training.
        """
        if self.training:
            iteration = self.iterations.next(iteration)
        batch = self.make_batch(batched_inputs, stats, iteration, with_targets=self.training)
        predictions = self.predict(batch)
        return self.losses(predictions, batch) if self.training else self.detect(predictions, batch)

    def make_batch(
        self,
        samples: list[dict],
        stats: BatchStats | None = None,
        iteration: int | None = None,
        *,
        with_targets: bool = False,
    ) -> Batch:
        """Make the batch of a forward pass; the arguments are those of `forward`.

        with_targets: ground truth, and a teacher's boxes where the model is taught; otherwise the
        prompts of an inference.
        """
        if with_targets and stats is None:
            stats = batch_stats(samples, self.device)
        canvas = {} if stats is None else {"height": stats.height, "width": stats.width}
        images, padding = pad_images(
            [
                (s["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
                for s in samples
            ],
            self.size_divisibility,
            **canvas,
        )
        if images.device.type == "cpu":  # oneDNN's convolutions are then faster
            images = images.contiguous(memory_format=torch.channels_last)
        sizes = [tuple(sample["image"].shape[-2:]) for sample in samples]
        batch = Batch(
            images=images,
            padding=padding,
            sizes=sizes,
            output_sizes=[
                (sample.get("height", height), sample.get("width", width))
                for sample, (height, width) in zip(samples, sizes, strict=True)
            ],
        )
        if not with_targets:
            prompts = prompts_from(samples, self.num_classes, self.device)
            return replace(batch, prompts=prompts)
        sees_padding = self.training and self.has_masks and self.core.as_published
        if sees_padding and {*sizes} != {tuple(padding.shape[1:])}:
            raise InputError(
                "MODEL.DN_DETR.AS_PUBLISHED with masks needs images of one size, a multiple of "
                f"{self.size_divisibility}, as INPUT.SCALE_JITTER makes them, got {sizes}."
            )
        taught = {}
        if self.teaching is not None and self.training:
            taught = {
                "teacher_boxes": teacher_targets(samples, self.num_classes).to(self.device),
                "num_teacher_boxes": stats.num_teacher_boxes,
            }
        # Rounding a part up to the objects of the whole gives just as many padded ones.
        multiple_of = self.pad_objects_to * -(-stats.most_objects // self.pad_objects_to)
        targets = to_targets(
            samples,
            seed=self.seed,
            iteration=iteration or 0,
            num_classes=self.num_classes,
            with_masks=self.has_masks,
            multiple_of=multiple_of,
        )
        return replace(
            batch, targets=targets.to(self.device), num_objects=stats.num_objects, **taught
        )

    def predict(self, batch: Batch) -> Predictions:
        """Run backbone and core."""
        features = call_in_autocast(self.backbone, batch.images)
        features = [features[name] for name in self.in_features]
        prompt = None if batch.prompts is None else partial(add_prompts, given=batch.prompts)
        return call_in_autocast(self.core, features, batch.padding, batch.targets, prompt=prompt)

    def losses(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:
        """Return scalar losses by name."""
        # Several processes raise together, after the backward pass in which they meet.
        is_alone = comm.get_world_size() == 1
        assignments = assign(predictions, batch.targets, self.costs, raises=is_alone)
        losses = self.criterion(predictions, batch.targets, assignments, batch.num_objects)
        if self.teaching is not None:
            losses.update(self.teaching(predictions, batch.teacher_boxes, batch.num_teacher_boxes))
        return losses

    def find_nonfinite(self, samples: list[dict], stats: BatchStats, iteration: int) -> str:
        """Compute the forward pass of `losses` again, and tell where the matcher meets numbers that
        are not finite; "" where it does not. (On a GPU the losses alone do not tell.)
        """
        batch = self.make_batch(samples, stats, iteration, with_targets=True)
        with torch.no_grad():
            predictions = self.predict(batch)
            return find_nonfinite(assign(predictions, batch.targets, self.costs, raises=False))

    def detect(self, predictions: Predictions, batch: Batch) -> list[dict]:
        """Return {"instances": detections, ...} of each image, in pixels of its output size."""
        options = {"top_k": self.top_k, "has_no_object": self.has_no_object}
        if self.has_masks:
            canvas = tuple(batch.images.shape[-2:])
            detections = postprocess_masks(
                predictions, batch.sizes, canvas=canvas, output_sizes=batch.output_sizes, **options
            )
            found = [
                to_instances(*image) for image in zip(detections, batch.output_sizes, strict=True)
            ]
        else:
            detections = postprocess(predictions, batch.sizes, **options)
            found = [
                detector_postprocess(to_instances(detected, size), *output_size)
                for detected, size, output_size in zip(
                    detections, batch.sizes, batch.output_sizes, strict=True
                )
            ]
        outputs = [{"instances": instances} for instances in found]
        if batch.prompts is not None:
            prompted = classify_prompts(predictions, batch, has_no_object=self.has_no_object)
            for output, one in zip(outputs, prompted, strict=True):
                output["prompts"] = one
        return outputs


def core_of(model: nn.Module, asked: str) -> DETR:
    """The core of a detector. InputError, which says what was asked for, where it has none."""
    if not isinstance(model, DenoisingDETR):
        raise InputError(
            f"{asked} works with DenoisingDETR only: this model is a "
            f"{type(model).__name__} and has no encoder and decoder."
        )
    return model.core


def check_promptable(model: nn.Module, *, asks_names: bool) -> None:
    """InputError unless objects can be given to this detector; asks_names: also ones without
    label.
    """
    core = core_of(model, "box prompts")
    if core.mask_head is not None:
        raise InputError("box prompts need a detector of boxes: this one finds masks.")
    if not core.query_design.content.has_labels:
        raise InputError(
            "box prompts need label embeddings, but this detector has none: it was trained without "
            "denoising and without MODEL.DN_DETR.BOX_PROMPTS."
        )
    if asks_names and not any(auxiliary.hides_labels for auxiliary in core.auxiliary):
        raise InputError(
            "box prompts without a class name need a detector trained with "
            "MODEL.DN_DETR.BOX_PROMPTS: give a name for each."
        )
