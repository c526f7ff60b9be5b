"""Faster R-CNN with denoising (1506.01497 with FPN, 1612.03144; denoised as in the TPAMI version of
2203.01305, table 3).

Detectron2's own GeneralizedRCNN and StandardROIHeads. In training, noised boxes of the ground truth
go through the box head as extra regions, beside the sampled proposals, and each must be moved
onto the object that it was made from, whatever their overlap. Inference is Detectron2's, unchanged.

The paper leaves open whether these regions are classified. Here they are not: the class of a region
follows from its overlap with an object, a noised box often has too little of it, and "object" for
those would contradict what the proposals learn. As there, labels are not noised: they are no input.
"""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch import Tensor

from dn_detr.auxiliary.denoising import Denoising, DenoisingQueries
from dn_detr.d2.config.fields import read_fields
from dn_detr.d2.data.catalog import with_num_classes
from dn_detr.d2.modeling.batch import BatchStats
from dn_detr.d2.modeling.feature_names import check_rcnn_features
from dn_detr.d2.modeling.instances import IterationCounter, to_targets
from dn_detr.layers.box_ops import cxcywh_to_xyxy
from dn_detr.structures import NoisedObjects


@META_ARCH_REGISTRY.register()
class DenoisingRCNN(GeneralizedRCNN):
    """Any GeneralizedRCNN with StandardROIHeads, trained with or without denoising.

    Inputs and outputs are those of `DenoisingDETR`. denoise: how ground truth is noised, or None;
    seed: from which, with iteration and image, the noise follows.
    """

    @configurable
    def __init__(self, *, denoise: DenoisingQueries | None, seed: int, **parts):
        super().__init__(**parts)
        self.denoise = denoise
        self.seed = seed
        self.iterations = IterationCounter()

    @classmethod
    def from_config(cls, cfg) -> dict:
        cfg = with_num_classes(cfg).clone()
        node = cfg.MODEL.DN_DETR
        if node.TEACH.ENABLED or node.BOX_PROMPTS.ENABLED:
            raise ValueError(
                "DenoisingRCNN has no queries: MODEL.DN_DETR.TEACH and BOX_PROMPTS must be off"
            )
        cfg.defrost()
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = node.NUM_CLASSES
        try:
            parts = super().from_config(cfg)
        except KeyError:
            check_rcnn_features(cfg)
            raise
        return {
            **parts,
            "denoise": box_denoising(node) if node.DENOISING.ENABLED else None,
            "seed": cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        }

    def forward(
        self,
        batched_inputs: list[dict],
        stats: BatchStats | None = None,
        iteration: int | None = None,
    ) -> dict[str, Tensor] | list[dict]:
        """stats: not needed, as all losses are means over the regions of these images. iteration:
        as for `DenoisingDETR`.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        objects = [sample["instances"].to(self.device) for sample in batched_inputs]
        features = self.backbone(images.tensor)
        proposals, losses = self.proposal_generator(images, features, objects)
        sampled, more = self.roi_heads(images, features, proposals, objects)
        losses = {name: loss.float() for name, loss in {**losses, **more}.items()}
        if self.denoise is not None:
            iteration = self.iterations.next(iteration)
            regions = self.noised_regions(batched_inputs, objects, iteration)
            num_sampled = sum(len(proposals) for proposals in sampled)
            losses["loss_box_reg_dn"] = self.denoising_loss(features, regions, num_sampled)
        return losses

    def find_nonfinite(self, samples: list[dict], stats: BatchStats, iteration: int) -> str:
        """Nothing is matched one to one here: ""."""
        return ""

    def noised_regions(
        self, batched_inputs: list[dict], objects: list[Instances], iteration: int
    ) -> list[Instances]:
        """The noised boxes of each image, all groups: see `regions_of`."""
        targets = to_targets(
            batched_inputs,
            seed=self.seed,
            iteration=iteration,
            num_classes=self.roi_heads.num_classes,
        )
        noised, _ = self.denoise.noise(
            targets.to(self.device), num_matched=0, mask_dtype=torch.float32
        )
        return [regions_of(noised, image, one) for image, one in enumerate(objects)]

    def denoising_loss(
        self, features: dict[str, Tensor], regions: list[Instances], num_sampled: int
    ) -> Tensor:
        """Return the box loss of the noised regions, a scalar.

        It is divided by the number of sampled proposals, as Detectron2 divides theirs: a noised box
        weighs as much as a proposal on an object.
        """
        heads, predictor = self.roi_heads, self.roi_heads.box_predictor
        maps = [features[name] for name in heads.box_in_features]
        pooled = heads.box_pooler(maps, [one.proposal_boxes for one in regions])
        _, deltas = predictor(heads.box_head(pooled))
        boxes = Boxes.cat([one.proposal_boxes for one in regions]).tensor
        truth = Boxes.cat([one.gt_boxes for one in regions]).tensor
        classes = torch.cat([one.gt_classes for one in regions])
        mean = predictor.box_reg_loss(boxes, truth, deltas, classes)
        weight = predictor.loss_weight.get("loss_box_reg", 1.0)
        return mean.float() * (weight * len(classes) / max(1, num_sampled))


def box_denoising(node) -> DenoisingQueries:
    """Denoising of boxes alone, as MODEL.DN_DETR says. ValueError if it asks for more."""
    noise = node.DENOISING
    if noise.LABEL_NOISE or noise.CONTRASTIVE:
        raise ValueError(
            "DenoisingRCNN noises boxes alone: MODEL.DN_DETR.DENOISING must have LABEL_NOISE "
            f"0.0 and CONTRASTIVE False, got {noise.LABEL_NOISE} and {noise.CONTRASTIVE}"
        )
    return DenoisingQueries(read_fields(noise, Denoising), num_classes=node.NUM_CLASSES)


def regions_of(noised: NoisedObjects, image: int, objects: Instances) -> Instances:
    """The noised boxes of an image inside it and at least a pixel wide and high, as proposal_boxes
    in pixels, beside gt_boxes and gt_classes of the object that each was made from.
    """
    height, width = objects.image_size
    is_noised = ~noised.is_empty[image]
    boxes = noised.boxes[image, is_noised] * noised.boxes.new_tensor([width, height] * 2)
    boxes = torch.cat((boxes[:, :2], boxes[:, 2:].clamp(min=1)), dim=1)
    source = noised.assignment[image, is_noised]
    regions = Instances(objects.image_size)
    regions.proposal_boxes = Boxes(cxcywh_to_xyxy(boxes))
    regions.proposal_boxes.clip(objects.image_size)
    regions.gt_boxes = objects.gt_boxes[source]
    regions.gt_classes = objects.gt_classes[source]
    return regions
