"""The configuration keys of training: solver, evaluation during training, logging."""

from __future__ import annotations

import math
from functools import reduce

from detectron2.config import CfgNode

from dn_detr.errors import InputError


def add_training_config(cfg: CfgNode) -> None:
    """Add the keys of training, with the published 50-epoch values; all options are off."""
    # "ADAMW", or "SGD" with Detectron2's MOMENTUM and NESTEROV; the published schedule: 50 epochs
    # of COCO at 16 images, 0.1x after 40.
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BASE_LR = 1e-4
    cfg.SOLVER.WEIGHT_DECAY = 1e-4
    # Of norms, and of label, query and level embeddings; None: WEIGHT_DECAY, as in all published
    # code except that of Mask2Former and Mask DINO (0) and Detectron2's own detectors (norms: 0).
    cfg.SOLVER.WEIGHT_DECAY_NORM = None
    cfg.SOLVER.WEIGHT_DECAY_EMBED = None
    # Length in epochs of the training images: sets MAX_ITER and scales STEPS, warm-up, FLAT_ITERS,
    # FINAL_ITERS, EMA.WARMUP, INPUT.SCHEDULE, TEST.EVAL_PERIOD and CHECKPOINT_PERIOD with it,
    # except those that are set on the command line. 0: MAX_ITER as written.
    cfg.SOLVER.EPOCHS = 0.0
    # Learning-rate factors of the backbone, and of the linear layers for sampling offsets and
    # reference points.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.SAMPLING_MULTIPLIER = 0.1
    # Gradient accumulation: the IMS_PER_BATCH images of a step in this many parts. Less memory,
    # same gradients up to rounding (except for batch norm and dropout, which see the parts).
    cfg.SOLVER.ACCUMULATE = 1
    # Mixed precision: "bfloat16" or "float16"; switched on by SOLVER.AMP.ENABLED.
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    # Layer-wise learning-rate decay of the backbone: the first of n layers (stages, or blocks of a
    # transformer) gets the factor BACKBONE_LAYER_DECAY ** (n - 1). 1: none.
    cfg.SOLVER.BACKBONE_LAYER_DECAY = 1.0
    # LR_SCHEDULER_NAME is one of Detectron2's, "WarmupMultiStepLR" (0.1x at STEPS) or
    # "WarmupCosineLR" (to BASE_LR_END), or "WarmupFlatCosineLR" (DEIM, 2412.04234): BASE_LR until
    # FLAT_ITERS, a cosine to BASE_LR_END, and that for the last FINAL_ITERS. WARMUP_METHOD may then
    # also be "quadratic".
    cfg.SOLVER.FLAT_ITERS = 0
    cfg.SOLVER.FINAL_ITERS = 0
    # Exponential moving average of the weights, evaluated as well (metrics "ema/bbox/AP", ...) and
    # saved in every checkpoint: MODEL.WEIGHTS "model_final.pth@ema" loads it. Its decay after
    # update u is DECAY * (1 - exp(-u / WARMUP)), so that it soon forgets the random start.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9997
    cfg.SOLVER.EMA.WARMUP = 2000
    # A checkpoint is due every SOLVER.CHECKPOINT_PERIOD iterations, and this many minutes after the
    # last one; 0: by iterations only.
    cfg.SOLVER.CHECKPOINT_MINUTES = 0.0
    # Checkpoints that stay: the newest ones (0: all) and those at multiples of KEEP_EVERY
    # iterations (0: no others), beside model_best.pth and model_final.pth.
    cfg.SOLVER.KEEP_NEWEST = 3
    cfg.SOLVER.KEEP_EVERY = 0
    # Save model_best.pth whenever this metric of the evaluation ("bbox/AP", "ema/bbox/AP", ...) is
    # a new best: MODE "max" or "min". "": off.
    cfg.TEST.BEST = CfgNode()
    cfg.TEST.BEST.METRIC = ""
    cfg.TEST.BEST.MODE = "max"
    # Early stopping: end the training after PATIENCE evaluations without a new best. "": off.
    cfg.TEST.EARLY_STOP = CfgNode()
    cfg.TEST.EARLY_STOP.METRIC = ""
    cfg.TEST.EARLY_STOP.MODE = "max"
    cfg.TEST.EARLY_STOP.PATIENCE = 5
    # Metrics of DN-DETR after every evaluation: queries per image that are matched to another
    # object than at the last evaluation ("matching/instability"), and distances of the initial
    # references to their matched objects ("matching/anchor_distance", in image sides; not for
    # queries without reference). NUM_IMAGES of the first dataset of DATASETS.TEST, evenly spaced;
    # 0: all.
    cfg.TEST.INSTABILITY = CfgNode()
    cfg.TEST.INSTABILITY.ENABLED = False
    cfg.TEST.INSTABILITY.NUM_IMAGES = 0
    # Activation checkpointing of the layers of these parts: "backbone", "encoder", "decoder". They
    # are recomputed in the backward pass: less memory, same losses.
    cfg.MODEL.DN_DETR.RECOMPUTE = []
    # torch.compile the core in training with this backend ("inductor"); "": off. PAD_OBJECTS_TO 8
    # then avoids recompilations.
    cfg.MODEL.DN_DETR.COMPILE = ""
    # Data order, augmentation and noise follow from the seed and the iteration, so that a resumed
    # training equals an uninterrupted one. -1: random, and kept in checkpoints for resuming.
    cfg.SEED = 42
    # Deterministic algorithms only (the CPU's always are): slower on a GPU, and an error where
    # PyTorch has none.
    cfg.DETERMINISTIC = False
    # Minutes that a process waits for another one before it takes it for lost.
    cfg.PROCESS_TIMEOUT = 30.0
    # Weights & Biases (pip install wandb) beside metrics.json and TensorBoard, with all that they
    # hold; NAME "": that of the folder. One run for each OUTPUT_DIR, also after resuming.
    cfg.WANDB = CfgNode()
    cfg.WANDB.ENABLED = False
    cfg.WANDB.PROJECT = "dn_detr"
    cfg.WANDB.NAME = ""
    # Iterations between two lines in the log, metrics.json and TensorBoard, which hold the medians
    # of the losses over these iterations; with 1, metrics.json holds every loss of every iteration.
    cfg.LOG_PERIOD = 20


LEAST = {
    **dict.fromkeys(("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "LOG_PERIOD"), 1),
    **dict.fromkeys(("SOLVER.KEEP_NEWEST", "SOLVER.KEEP_EVERY", "TEST.EVAL_PERIOD"), 0),
    "TEST.COCO_LIMIT": 0,
    **dict.fromkeys(("SOLVER.EPOCHS", "DATALOADER.NUM_WORKERS"), 0),
    **{"SOLVER.CHECKPOINT_MINUTES": 0, "PROCESS_TIMEOUT": 0.01},
}
"""Keys and their smallest values."""

FORMATS = ("RGB", "BGR")
"""Channel orders that `mapper.in_order` makes."""


def check_values(cfg: CfgNode) -> None:
    """Raise an InputError for the first key with a value that no run can have."""
    for key, least in LEAST.items():
        value = reduce(getattr, key.split("."), cfg)
        if not value >= least:
            raise InputError(f"{key} must be at least {least}, got {value}.")
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    for key, value, is_right, expected in (
        ("SEED", cfg.SEED, cfg.SEED < 2**32, "below 2^32"),
        ("SOLVER.EPOCHS", cfg.SOLVER.EPOCHS, math.inf > cfg.SOLVER.EPOCHS, "finite"),
        ("INPUT.MIN_SIZE_TRAIN", sizes, sizes and min(sizes) >= 1, "one or more sizes in pixels"),
        ("INPUT.FORMAT", cfg.INPUT.FORMAT, cfg.INPUT.FORMAT in FORMATS, f"one of {FORMATS}"),
    ):
        if not is_right:
            raise InputError(f"{key} must be {expected}, got {value!r}.")
