"""The configuration keys of training: solver, evaluation during training, logging."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_training_config(cfg: CfgNode) -> None:
    """Add the keys of training, with the published 50-epoch values; everything further is off."""
    # AdamW and the published schedule: 50 epochs of COCO at 16 images, 0.1x after 40.
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BASE_LR = 1e-4
    cfg.SOLVER.WEIGHT_DECAY = 1e-4
    # Learning-rate factors of the backbone, and of the linear layers that make sampling offsets
    # and reference points.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.SAMPLING_MULTIPLIER = 0.1
    # Computes the IMS_PER_BATCH images of a step in so many parts, one after the other: less memory,
    # the same gradients to float rounding (but for batch norm and dropout, which see the parts).
    cfg.SOLVER.ACCUMULATE = 1
    # Mixed precision: "bfloat16" or "float16"; switched on by SOLVER.AMP.ENABLED.
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    # A moving average of the weights, evaluated beside them (metrics "ema/bbox/AP", ...) and saved
    # in every checkpoint: MODEL.WEIGHTS "model_final.pth@ema" reads it. After the update u it keeps
    # the share DECAY * (1 - exp(-u / WARMUP)) of itself, so that it soon forgets the random start.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9997
    cfg.SOLVER.EMA.WARMUP = 2000
    # The instruments of DN-DETR after every evaluation: how many queries of an image have another
    # object than at the evaluation before ("matching/instability"), and how far the initial
    # references are from the objects that they are matched with ("matching/anchor_distance", in
    # image sides; absent where queries start without one). On so many images of the first dataset
    # of DATASETS.TEST, spread evenly; 0: all.
    cfg.TEST.INSTABILITY = CfgNode()
    cfg.TEST.INSTABILITY.ENABLED = False
    cfg.TEST.INSTABILITY.NUM_IMAGES = 0
    # Same seed, same run: data, augmentation and noise follow from it and from the iteration, so
    # that a resumed training continues as if it had never stopped. -1: another one every time.
    cfg.SEED = 42
    # Iterations between two lines in the log, metrics.json and TensorBoard, which hold the medians
    # of the losses over these iterations; with 1, metrics.json holds every loss of every iteration.
    cfg.LOG_PERIOD = 20
