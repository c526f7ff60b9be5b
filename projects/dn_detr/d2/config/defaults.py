"""The configuration keys of this project, beside Detectron2's own."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode, get_cfg
from yaml import YAMLError

from dn_detr.build import BoxPrompting, Denoising, HybridMatching, LossConfig
from dn_detr.d2.config.fields import add_fields
from dn_detr.d2.config.files import checked_pairs, find_config, read_files, with_floats
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
    # Datasets in COCO format, registered without Python code: a list of [name, json, image_root].
    # Use the names in DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.COCO_FORMAT = []
    # A dataset folder in COCO's, YOLO's or Pascal VOC's format, or a data.yaml. It is registered as
    # <folder>_train, <folder>_val and <folder>_test, and sets TRAIN and TEST unless they name
    # these. Where guessing fails: IMAGES and ANNOTATIONS, folder or pattern relative to it.
    cfg.DATASETS.FOLDER = ""
    cfg.DATASETS.IMAGES = ""
    cfg.DATASETS.ANNOTATIONS = ""
    # Boxes of teachers for MODEL.DN_DETR.TEACH: a list of [dataset, json], one for each training
    # dataset, in COCO's result format (tools/make_teacher_boxes.py writes it).
    cfg.DATASETS.TEACHER_BOXES = []
    # Checks before the first iteration: "full" (annotations and images) or "off".
    cfg.DATASETS.CHECK = "full"
    # An image file that cannot be used (missing, damaged, of another size): "stop" ends the
    # training, "skip" trains on another image instead, which follows from the seed, until a process
    # has met more than MAX_BAD_IMAGES. In an evaluation it always counts as one without detections.
    cfg.DATALOADER.BAD_IMAGES = "stop"
    cfg.DATALOADER.MAX_BAD_IMAGES = 10
    # As in the published code, images are not grouped by aspect ratio: a sample only depends on its
    # position in the stream.
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    # The crop branch of DETR's augmentation, taken with probability 0.5: shorter side to one of
    # MIN_SIZE_BEFORE, a crop with sides in INPUT.CROP.SIZE, then the usual resize.
    cfg.INPUT.CROP.TYPE = "absolute_range"
    cfg.INPUT.CROP.SIZE = (384, 600)
    cfg.INPUT.CROP.MIN_SIZE_BEFORE = (400, 500, 600)
    # Large-scale jitter, as in Mask2Former and Mask DINO, instead of crop and resize: the image is
    # scaled to fit into SIZE x SIZE times a factor from RANGE, then cropped to at most SIZE x SIZE.
    cfg.INPUT.SCALE_JITTER = CfgNode()
    cfg.INPUT.SCALE_JITTER.ENABLED = False
    cfg.INPUT.SCALE_JITTER.RANGE = (0.1, 2.0)
    cfg.INPUT.SCALE_JITTER.SIZE = 1024
    # Dense O2O (DEIM, 2412.04234): more objects in an image, by mosaic and mixup. Iterations
    # [first, flat, last]: mosaic and mixup from first to flat, crops from first to last; otherwise
    # images are only flipped and resized. []: everything, always.
    cfg.INPUT.SCHEDULE = []
    # With this probability, a mosaic replaces an image: four images with a shorter side of SIZE
    # pixels, rotated by up to ROTATION degrees, translated by up to TRANSLATION of its sides and
    # scaled by a factor from SCALE. Objects with less than MIN_VISIBLE of their box left are
    # dropped.
    cfg.INPUT.MOSAIC = CfgNode()
    cfg.INPUT.MOSAIC.ENABLED = False
    cfg.INPUT.MOSAIC.PROBABILITY = 0.5
    cfg.INPUT.MOSAIC.SIZE = 320
    cfg.INPUT.MOSAIC.ROTATION = 10.0
    cfg.INPUT.MOSAIC.TRANSLATION = 0.1
    cfg.INPUT.MOSAIC.SCALE = (0.5, 1.5)
    cfg.INPUT.MOSAIC.MIN_VISIBLE = 0.1
    # With this probability, every image of a batch (of each process) is blended with the one before
    # it, with a weight from BLEND for itself, and gets the objects of both.
    cfg.INPUT.MIXUP = CfgNode()
    cfg.INPUT.MIXUP.ENABLED = False
    cfg.INPUT.MIXUP.PROBABILITY = 0.5
    cfg.INPUT.MIXUP.BLEND = (0.45, 0.55)

    # ------------------------------------------------------------------------------- evaluation
    # Write a report on every test dataset: OUTPUT_DIR/inference/report_<name>/report.html, or
    # OUTPUT_DIR/inference/<name>/report_<name>/report.html if there are several.
    cfg.TEST.REPORT = False
    # Detections per class and image that count: 100 in COCO's AP, and so in published results; 0:
    # all TEST.DETECTIONS_PER_IMAGE, for datasets with more objects in an image.
    cfg.TEST.COCO_LIMIT = 100
    # COCO evaluation backend: "detectron2" (its C++), "pycocotools" (slow) or "faster_coco_eval"
    # (pip install faster-coco-eval); they agree up to rounding.
    cfg.TEST.COCO_EVAL = "detectron2"

    # ------------------------------------------------------------------------------------ model
    node = cfg.MODEL.DN_DETR = CfgNode()
    # The method: one of dn_detr.methods.METHODS.
    node.METHOD = "dab_deformable"
    # Number of classes; 0: that of the first training dataset (COCO: 80).
    node.NUM_CLASSES = 0
    # Class names of the model, filled in from the checkpoint for an evaluation: test datasets may
    # have some of them, in any order.
    node.CLASS_NAMES = []
    # Hyper-parameters of the methods, each read by those whose dataclass has it.
    for method in METHODS:
        add_fields(node, config_class(method), without=("has_no_object",))
    # Backbone features for the neck, fine to coarse; single-scale methods use the coarsest. Methods
    # with masks (MODEL.MASK_ON) use the first for mask features only.
    node.IN_FEATURES = ["res3", "res4", "res5"]

    # With MODEL.BACKBONE.NAME build_named_backbone: "torchvision/swin_t", "timm/convnext_tiny", ...
    # and whether the library's ImageNet weights are downloaded if MODEL.WEIGHTS is "".
    node.BACKBONE = ""
    node.BACKBONE_PRETRAINED = True
    # Side of the attention windows of a plain vision transformer of timm, in patches of 16 pixels;
    # four of its blocks attend to the whole image (ViTDet, 2203.16527: 14). 0: all of them.
    node.BACKBONE_WINDOW = 0

    # Backbone parameters that MODEL.WEIGHTS may lack, as prefixes, e.g. ["stem.conv1"]; they are
    # initialized randomly. A file that lacks others is refused.
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


def default_config() -> CfgNode:
    """Return Detectron2's configuration with the keys of this project."""
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    return cfg


def read_config(config_file: str, opts: list[str]) -> CfgNode:
    """Read a configuration, with pairs of key and value on top of it.

    Args:
        config_file: Path, or name of one of this project's configurations (`files.find_config`).
        opts: KEY, VALUE, ...
    """
    if not config_file:
        raise InputError("--config-file is missing: name one of configs/, or one of your own.")
    config_file = find_config(config_file)
    cfg = default_config()
    default = cfg.clone()

    def merge_file(path: str) -> None:
        cfg.merge_from_other_cfg(CfgNode(with_floats(read_files(path), cfg)))

    merge(f"the configuration {config_file}", merge_file, config_file)
    merge_opts(cfg, opts)
    check_keys(cfg, default, config_file, opts)
    return cfg


def merge_opts(cfg: CfgNode, opts: list[str]) -> None:
    """Merge the KEY VALUE pairs of a command line; an unknown key becomes "did you mean"."""
    pairs = checked_pairs(opts, cfg)
    merge("the KEY VALUE pairs of the command line", cfg.merge_from_list, pairs)


def merge(name: str, into_config: Callable, source) -> None:
    """Merge one source of configuration; what is wrong in it becomes one sentence."""
    try:
        into_config(source)
    except (KeyError, ValueError, AssertionError, OSError, YAMLError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        reason = " ".join(str(reason).split()).rstrip(".!")
        raise InputError(f"{name} cannot be used: {reason}.") from error
