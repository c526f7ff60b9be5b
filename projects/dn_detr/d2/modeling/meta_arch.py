"""The Detectron2 meta-architecture: list[dict] in, losses or Instances out."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn

from dn_detr.auxiliary.box_prompts import RandomBoxPrompts
from dn_detr.d2.data.catalog import with_num_classes
from dn_detr.d2.modeling.batch import BatchStats, batch_stats
from dn_detr.d2.modeling.from_config import core_from, losses_from
from dn_detr.d2.modeling.instances import IterationCounter, to_instances, to_target, to_targets
from dn_detr.d2.modeling.prompts import classify_prompts, prompts_from
from dn_detr.errors import InputError
from dn_detr.losses.criterion import Criterion
from dn_detr.losses.mask_costs import MaskCosts
from dn_detr.losses.matcher import Costs, assign
from dn_detr.losses.teacher_loss import Teaching
from dn_detr.models.detection_transformer import DETR
from dn_detr.models.mask_postprocess import postprocess_masks
from dn_detr.models.postprocess import postprocess
from dn_detr.structures import Assignments, Predictions, Targets, pad_targets


@META_ARCH_REGISTRY.register()
class DenoisingDETR(nn.Module):
    """Any page of `dn_detr.methods` behind a Detectron2 backbone.

    Takes Detectron2's list of dicts: "image" [3, H, W] in 0..255, "instances" in training, and the
    output size "height", "width". Gives a dict of scalar losses in training, and in evaluation a
    list of {"instances": pred_boxes in pixels of the output size, scores, pred_classes}; pages with
    masks need gt_masks, and give pred_masks bool [N, height, width]. With `teaching`, training needs
    "teacher_instances" too (gt_boxes, gt_classes, scores). In evaluation a sample may have "prompts",
    see `prompts_from`; its output then has "prompts" too: their pred_classes and scores.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        in_features: list[str],
        core: DETR,
        size_divisibility: int,
        costs: Costs | MaskCosts,
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
        self.assignments: Assignments = {}  # of the last training batch
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean)[:, None, None], False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std)[:, None, None], False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        cfg = with_num_classes(cfg)
        backbone = build_backbone(cfg)
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
        whole: BatchStats | None = None,
        iteration: int | None = None,
    ) -> dict[str, Tensor] | list[dict]:
        """whole: the batch that these are a part of in training; None: they are all of it.

        iteration: from which, with seed and image id, the noise of training follows; None: the model
        counts its training forwards."""
        if self.training and whole is None:
            whole = batch_stats(batched_inputs, self.device)
        images, padding = self.preprocess(batched_inputs, whole)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.in_features]
        if not self.training:
            prompt = prompts_from(batched_inputs, self.num_classes, self.device)
            predictions = self.core(features, padding, prompt=prompt)
            return self.detect(predictions, images, batched_inputs)
        targets = self.targets(batched_inputs, whole, self.iterations.next(iteration))
        predictions = self.core(features, padding, targets)
        self.assignments = assign(predictions, targets, self.costs)
        losses = self.criterion(predictions, targets, self.assignments, whole.num_objects)
        if self.teaching is not None:
            boxes = self.teacher_boxes(batched_inputs)
            losses.update(self.teaching(predictions, boxes, whole.num_teacher_boxes))
        return losses

    def detect(
        self, predictions: Predictions, images: ImageList, batched_inputs: list[dict]
    ) -> list[dict]:
        """Predictions as Instances, in pixels of the size that the dataset asks for."""
        sizes = images.image_sizes
        wanted = [
            (sample.get("height", height), sample.get("width", width))
            for sample, (height, width) in zip(batched_inputs, sizes, strict=True)
        ]
        if self.has_masks:
            canvas = tuple(images.tensor.shape[-2:])
            options = {"canvas": canvas, "output_sizes": wanted, "top_k": self.top_k}
            detections = postprocess_masks(
                predictions, sizes, has_no_object=self.has_no_object, **options
            )
            found = [to_instances(*image) for image in zip(detections, wanted, strict=True)]
        else:
            detections = postprocess(
                predictions, sizes, self.top_k, has_no_object=self.has_no_object
            )
            found = [
                detector_postprocess(to_instances(detected, size), *output_size)
                for detected, size, output_size in zip(detections, sizes, wanted, strict=True)
            ]
        outputs = [{"instances": instances} for instances in found]
        if any("prompts" in sample for sample in batched_inputs):
            prompts = classify_prompts(
                predictions, batched_inputs, has_no_object=self.has_no_object
            )
            outputs = [
                {**output, "prompts": one} for output, one in zip(outputs, prompts, strict=True)
            ]
        return outputs

    def preprocess(
        self, batched_inputs: list[dict], whole: BatchStats | None = None
    ) -> tuple[ImageList, Tensor]:
        """Normalised images, padded to one canvas, that of the whole batch where there is one, and
        its padding [B, H, W] (True = padding)."""
        images = [
            (sample["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
            for sample in batched_inputs
        ]
        images = ImageList.from_tensors(images, self.size_divisibility)
        if whole is not None:
            canvas = whole.pad(images.tensor, self.size_divisibility)
            images = ImageList(canvas, images.image_sizes)
        padding = torch.ones(
            images.tensor.shape[0], *images.tensor.shape[-2:], dtype=torch.bool, device=self.device
        )
        for image, (height, width) in enumerate(images.image_sizes):
            padding[image, :height, :width] = False
        return images, padding

    def targets(
        self, batched_inputs: list[dict], whole: BatchStats | None = None, iteration: int = 0
    ) -> Targets:
        """Ground truth of a training batch, with the noise keys of an iteration, padded to as many
        objects as the whole batch where there is one."""
        multiple_of = self.pad_objects_to
        if whole is not None:  # rounding a part up to the slots of the whole gives just these
            multiple_of *= -(-whole.most_objects // multiple_of)
        targets = to_targets(
            batched_inputs,
            seed=self.seed,
            iteration=iteration,
            num_classes=self.num_classes,
            with_masks=self.has_masks,
            multiple_of=multiple_of,
        )
        return targets.to(self.device)

    def teacher_boxes(self, batched_inputs: list[dict]) -> Targets:
        """What a teacher saw in the images of a training batch, with its scores."""
        targets = [
            to_target(sample["teacher_instances"], num_classes=self.num_classes, noise_seed=0)
            for sample in batched_inputs
        ]
        return pad_targets(targets).to(self.device)


def core_of(model: nn.Module, asked: str) -> DETR:
    """The core of a detector. InputError, which says what was asked for, where it has none."""
    if not isinstance(model, DenoisingDETR):
        raise InputError(
            f"{asked} works on the pages of dn_detr.methods alone: this model is a "
            f"{type(model).__name__} and has no encoder and decoder."
        )
    return model.core


def check_promptable(model: nn.Module, *, asks_names: bool) -> None:
    """InputError unless objects can be given to this detector; asks_names: also ones without label."""
    core = core_of(model, "box prompts")
    if core.mask_head is not None:
        raise InputError("box prompts need a detector of boxes: this one finds masks.")
    if not any("label_embedding" in name for name, _ in core.named_parameters()):
        raise InputError(
            "box prompts need label embeddings, but this detector has none: it was trained without "
            "denoising and without MODEL.DN_DETR.BOX_PROMPTS."
        )
    if asks_names and not any(isinstance(assist, RandomBoxPrompts) for assist in core.auxiliary):
        raise InputError(
            "box prompts without a class name need a detector trained with MODEL.DN_DETR.BOX_PROMPTS: give "
            "a name for each."
        )
