"""The configuration keys of this project, beside Detectron2's own."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode, get_cfg
from yaml import YAMLError

from dn_detr.build import BoxPrompting, Denoising, HybridMatching, LossConfig
from dn_detr.d2.config.fields import add_fields
from dn_detr.d2.config.training_defaults import add_training_config
from dn_detr.d2.config.unread_keys import check_keys
from dn_detr.errors import InputError
from dn_detr.losses.teacher_loss import Teach
from dn_detr.methods import METHODS, config_class


def add_dn_detr_config(cfg: CfgNode) -> None:
    """Add the keys of dn_detr to a Detectron2 configuration, with the published 50-epoch values."""
    if "FLOAT32_PRECISION" not in cfg:  # an older Detectron2: a saved configuration may have it
        cfg.FLOAT32_PRECISION = ""
    # ------------------------------------------------------------------------------------- data
    # Datasets in COCO format, without any Python: a list of [name, json, image_root]. The names can
    # then be used in DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.COCO_FORMAT = []
    # Boxes of teachers for MODEL.DN_DETR.TEACH: a list of [dataset, json], one for each training
    # dataset: results in COCO's format, as tools/make_teacher_boxes.py makes them.
    cfg.DATASETS.TEACHER_BOXES = []
    # What is checked before the first iteration: "full" (annotations and images) or "off".
    cfg.DATASETS.CHECK = "full"
    # Images are not grouped by aspect ratio, as in the published code: a sample depends on its
    # position in the stream alone.
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    # The crop branch of DETR's augmentation, taken with probability 0.5: shorter side to one of
    # MIN_SIZE_BEFORE, a crop with sides in INPUT.CROP.SIZE, then the usual resize.
    cfg.INPUT.CROP.TYPE = "absolute_range"
    cfg.INPUT.CROP.SIZE = (384, 600)
    cfg.INPUT.CROP.MIN_SIZE_BEFORE = (400, 500, 600)
    # Large scale jitter, as in Mask2Former and Mask DINO, in place of crop and resizing: the image
    # scaled to fit into SIZE x SIZE times a factor from RANGE, and a crop of at most that size.
    cfg.INPUT.SCALE_JITTER = CfgNode()
    cfg.INPUT.SCALE_JITTER.ENABLED = False
    cfg.INPUT.SCALE_JITTER.RANGE = (0.1, 2.0)
    cfg.INPUT.SCALE_JITTER.SIZE = 1024
    # Dense O2O (DEIM, 2412.04234): more objects in an image, by mosaics and mixed images. When:
    # iterations [first, flat, last]. Mosaics and mixed images from first to flat, crops from first to
    # last; before and behind that, images are only flipped and resized. []: all of it, always.
    cfg.INPUT.SCHEDULE = []
    # With this probability a mosaic in place of an image: of four images with SIZE pixels at their
    # shorter side, turned by up to ROTATION degrees, moved by up to TRANSLATION of its sides, and
    # scaled by a factor from SCALE. Objects of whose box less than MIN_VISIBLE is left are dropped.
    cfg.INPUT.MOSAIC = CfgNode()
    cfg.INPUT.MOSAIC.ENABLED = False
    cfg.INPUT.MOSAIC.PROBABILITY = 0.5
    cfg.INPUT.MOSAIC.SIZE = 320
    cfg.INPUT.MOSAIC.ROTATION = 10.0
    cfg.INPUT.MOSAIC.TRANSLATION = 0.1
    cfg.INPUT.MOSAIC.SCALE = (0.5, 1.5)
    cfg.INPUT.MOSAIC.MIN_VISIBLE = 0.1
    # With this probability a batch (of each process) in which every image is laid over the one before
    # it: its own share is from BLEND, and it has the objects of both.
    cfg.INPUT.MIXUP = CfgNode()
    cfg.INPUT.MIXUP.ENABLED = False
    cfg.INPUT.MIXUP.PROBABILITY = 0.5
    cfg.INPUT.MIXUP.BLEND = (0.45, 0.55)

    # ------------------------------------------------------------------------------- evaluation
    # Also write a report on every test dataset: OUTPUT_DIR/inference/report_<name>/report.html.
    cfg.TEST.REPORT = False
    # Detections of a class in an image that count: 100 in COCO's own AP, and so in published ones; 0:
    # all TEST.DETECTIONS_PER_IMAGE, for datasets with more objects in an image.
    cfg.TEST.COCO_LIMIT = 100
    # Who computes AP: "detectron2" (its C++), "pycocotools" (slow), or "faster_coco_eval", to install
    # by pip; they agree to rounding.
    cfg.TEST.COCO_EVAL = "detectron2"

    # ------------------------------------------------------------------------------------ model
    node = cfg.MODEL.DN_DETR = CfgNode()
    # The method: one of dn_detr.methods.METHODS.
    node.METHOD = "dab_deformable"
    # Number of classes; 0: that of the first training dataset (COCO: 80).
    node.NUM_CLASSES = 0
    # Names of the model's classes, filled in from the checkpoint by an evaluation: datasets may have
    # some of them, in any order.
    node.CLASS_NAMES = []
    # Hyper-parameters of the methods, each read by those whose dataclass has it.
    for method in METHODS:
        add_fields(node, config_class(method), without=("has_no_object",))
    # Backbone features that the neck takes, fine to coarse; methods with a single scale take the
    # coarsest. For methods with masks (MODEL.MASK_ON) the first is for the masks alone.
    node.IN_FEATURES = ["res3", "res4", "res5"]

    # With MODEL.BACKBONE.NAME build_named_backbone: "torchvision/swin_t", "timm/convnext_tiny", ...
    # and whether that library's ImageNet weights are downloaded where MODEL.WEIGHTS is "".
    node.BACKBONE = ""
    node.BACKBONE_PRETRAINED = True

    # Parameters of the backbone that MODEL.WEIGHTS may lack, by the beginnings of their names, e.g.
    # ["stem.conv1"]; they start anew. Where the file lacks others, the training does not start.
    node.NEW_PARAMETERS = []

    # Query denoising, box prompts, the one-to-many branch of H-DETR, losses of a teacher's boxes
    # (DATASETS.TEACHER_BOXES), losses and matching costs: see these classes for every key.
    for name, kind, is_enabled in (
        ("DENOISING", Denoising, True),
        ("BOX_PROMPTS", BoxPrompting, False),
        ("HYBRID", HybridMatching, False),
        ("TEACH", Teach, False),
    ):
        node[name] = CfgNode({"ENABLED": is_enabled})
        add_fields(node[name], kind)
    node.LOSS = CfgNode()
    add_fields(node.LOSS, LossConfig)
    # The batch's largest object count is rounded up to a multiple of this: 1 as published, 8 for
    # few distinct shapes.
    node.PAD_OBJECTS_TO = 1
    # Group DETR (2207.13085): groups of NUM_QUERIES queries in training, each matched on its own;
    # 1: none. Excludes HYBRID.
    node.NUM_GROUPS = 1

    add_training_config(cfg)


def read_config(config_file: str, opts: list[str]) -> CfgNode:
    """The configuration in a file, with pairs of key and value on top of it."""
    if not config_file:
        raise InputError("--config-file is missing: name one of configs/, or one of your own.")
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    default = cfg.clone()
    merge(f"the configuration {config_file}", cfg.merge_from_file, config_file)
    merge("the KEY VALUE pairs of the command line", cfg.merge_from_list, opts)
    check_keys(cfg, default, config_file, opts)
    return cfg


def merge(name: str, into_config: Callable, source) -> None:
    """Merge one source of configuration; what is wrong in it becomes one sentence."""
    try:
        into_config(source)
    except (KeyError, ValueError, AssertionError, OSError, YAMLError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        reason = " ".join(str(reason).split()).rstrip(".!")
        raise InputError(f"{name} cannot be used: {reason}.") from error
