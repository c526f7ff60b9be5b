"""The configuration keys of this project, beside Detectron2's own."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode, get_cfg
from yaml import YAMLError

from dn_detr.d2.config.training_defaults import add_training_config
from dn_detr.errors import InputError


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
    # The page: one of dn_detr.methods.METHODS.
    node.METHOD = "dab_deformable"
    # Number of classes; 0: that of the first training dataset (COCO: 80).
    node.NUM_CLASSES = 0
    # Names of the model's classes, filled in from the checkpoint by an evaluation: datasets may have
    # some of them, in any order.
    node.CLASS_NAMES = []
    # Number of matched queries, the most detections that an image can have.
    node.NUM_QUERIES = 300
    # Width of tokens and queries.
    node.CHANNELS = 256
    node.NUM_HEADS = 8
    # Feature levels: those of the backbone, then strided convolutions of the last.
    node.NUM_LEVELS = 4
    # Sampling points of deformable attention, for each head and level.
    node.NUM_POINTS = 4
    node.FEED_FORWARD_DIM = 2048
    # The same of the encoder; 0: as above.
    node.ENCODER_FEED_FORWARD_DIM = 0
    node.ENCODER_LAYERS = 6
    node.DECODER_LAYERS = 6
    node.DROPOUT = 0.0
    # How close to 0 and 1 a coordinate may come before its logit is cut off.
    node.EPSILON = 1e-3
    # Scale anchors by the padded canvas before their sines, as the published DAB-Deformable-DETR
    # and DINO do. Only needed with their weights: results then depend on the batch's padding.
    node.SCALES_WITH_CANVAS = False
    # DAB-DETR and Anchor DETR: learned patterns, with each of which every query is asked once, so
    # that there are NUM_QUERIES x NUM_PATTERNS matched queries; 0: no patterns.
    node.NUM_PATTERNS = 0
    # DAB-DETR: matched queries start from one learned vector that all share, as DN-DETR's label
    # "unknown", instead of zero.
    node.SHARES_CONTENT = False
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

    # -------------------------------------------------------------------------------- denoising
    node.DENOISING = CfgNode()
    # Query denoising (2203.01305): noised ground truth as training-only queries.
    node.DENOISING.ENABLED = True
    # Groups, each a noised copy of all objects; 0: as many as fit into MAX_OBJECTS.
    node.DENOISING.NUM_GROUPS = 5
    # At most this many noised objects an image, over all groups. In more crowded images each group
    # holds a random subset of the objects.
    node.DENOISING.MAX_OBJECTS = 500
    # Centres move by up to BOX_NOISE / 2 of the size, sizes change by up to the share BOX_NOISE.
    node.DENOISING.BOX_NOISE = 0.4
    # Probability that a label is replaced by a random one (which may be the same).
    node.DENOISING.LABEL_NOISE = 0.2
    # Contrastive (DINO, 2203.03605): of every object also a negative copy, farther away, that must
    # say nothing. The sides of the box then move, by up to BOX_NOISE half sizes (negatives: up to
    # twice that).
    node.DENOISING.CONTRASTIVE = False
    # Hide the empty slots of images with fewer objects than the fullest one. The published code
    # leaves them visible; False reproduces it.
    node.DENOISING.HIDES_EMPTY = True
    # Methods with masks: denoising queries must rebuild masks too, not only boxes.
    node.DENOISING.MASKS = True
    # Known objects (2203.01305, TPAMI version): in training, random objects of the share PROBABILITY of
    # the images are given as queries that all matched queries see, the share HIDDEN_LABELS of them
    # without label, their boxes noised as in denoising. The detector can then be prompted.
    node.BOX_PROMPTS = CfgNode()
    node.BOX_PROMPTS.ENABLED = False
    node.BOX_PROMPTS.PROBABILITY = 0.5
    node.BOX_PROMPTS.HIDDEN_LABELS = 0.2
    node.BOX_PROMPTS.BOX_NOISE = 0.1
    # The batch's largest object count is rounded up to a multiple of this: 1 as published, 8 for
    # few distinct shapes.
    node.PAD_OBJECTS_TO = 1

    # -------------------------------------------------------------------------- further queries
    # Group DETR (2207.13085): groups of NUM_QUERIES queries in training, each matched on its own;
    # 1: none.
    node.NUM_GROUPS = 1
    # H-DETR (2207.13080): further queries in training among which each object is matched MATCHES_PER_OBJECT
    # times. Excludes groups.
    node.HYBRID = CfgNode()
    node.HYBRID.ENABLED = False
    node.HYBRID.NUM_QUERIES = 1500
    node.HYBRID.MATCHES_PER_OBJECT = 6
    node.HYBRID.WEIGHT = 1.0

    # --------------------------------------------------------------------------------- teaching
    # Teach-DETR (2211.11953): the boxes of DATASETS.TEACHER_BOXES as a second set of targets for the
    # matched queries, of all groups. Each weighs as much as its score; slots without one weigh
    # UNMATCHED_WEIGHT in the class loss. WEIGHT: of all these losses. Excludes known objects.
    node.TEACH = CfgNode()
    node.TEACH.ENABLED = False
    node.TEACH.WEIGHT = 1.0
    node.TEACH.UNMATCHED_WEIGHT = 0.5
    node.TEACH.CLASS_WEIGHT = 2.0
    node.TEACH.L1_WEIGHT = 5.0
    node.TEACH.GIOU_WEIGHT = 2.0

    # ------------------------------------------------------------------------------------- loss
    # Weights of the loss; the matching costs are COST_*.
    node.LOSS = CfgNode()
    # Class loss and matching cost: "focal", or "softmax" with a further logit for "no object", whose
    # slots weigh NO_OBJECT_WEIGHT (DETR), or "mal", the matchability-aware loss (DEIM, 2412.04234)
    # with the exponent MAL_GAMMA, matched as with "focal".
    node.LOSS.KIND = "focal"
    node.LOSS.MAL_GAMMA = 1.5
    node.LOSS.NO_OBJECT_WEIGHT = 0.1
    node.LOSS.CLASS_WEIGHT = 1.0
    node.LOSS.L1_WEIGHT = 5.0
    node.LOSS.GIOU_WEIGHT = 2.0
    node.LOSS.COST_CLASS = 2.0
    node.LOSS.COST_L1 = 5.0
    node.LOSS.COST_GIOU = 2.0
    # Focal loss: weight of positives, and exponent.
    node.LOSS.FOCAL_ALPHA = 0.25
    node.LOSS.FOCAL_GAMMA = 2.0
    # Methods with masks: cross-entropy and Dice of masks, taken at MASK_POINTS random points, the
    # share MASK_IMPORTANCE of which are the most unsure of MASK_OVERSAMPLE times as many.
    node.LOSS.MASK_WEIGHT = 5.0
    node.LOSS.DICE_WEIGHT = 5.0
    node.LOSS.COST_MASK = 5.0
    node.LOSS.COST_DICE = 5.0
    node.LOSS.MASK_POINTS = 12544
    node.LOSS.MASK_OVERSAMPLE = 3.0
    node.LOSS.MASK_IMPORTANCE = 0.75

    add_training_config(cfg)


def read_config(config_file: str, opts: list[str]) -> CfgNode:
    """The configuration in a file, with pairs of key and value on top of it."""
    if not config_file:
        raise InputError("--config-file is missing: name one of configs/, or one of your own.")
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    merge(f"the configuration {config_file}", cfg.merge_from_file, config_file)
    merge("the KEY VALUE pairs of the command line", cfg.merge_from_list, opts)
    return cfg


def merge(name: str, into_config: Callable, source) -> None:
    """Merge one source of configuration; what is wrong in it becomes one sentence."""
    try:
        into_config(source)
    except (KeyError, ValueError, AssertionError, OSError, YAMLError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        reason = " ".join(str(reason).split()).rstrip(".!")
        raise InputError(f"{name} cannot be used: {reason}.") from error
