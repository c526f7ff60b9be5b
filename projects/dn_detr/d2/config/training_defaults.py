"""The configuration keys of training: solver, evaluation during training, logging."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_training_config(cfg: CfgNode) -> None:
    """Add the keys of training, with the published 50-epoch values; everything further is off."""
    # "ADAMW", or "SGD" with Detectron2's MOMENTUM and NESTEROV; the published schedule: 50 epochs of
    # COCO at 16 images, 0.1x after 40.
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
    # Further factor for each layer (stage, or block of a transformer) of the backbone, from its last
    # one back: the first of n layers learns with BACKBONE_LAYER_DECAY ** (n - 1). 1: all alike.
    cfg.SOLVER.BACKBONE_LAYER_DECAY = 1.0
    # LR_SCHEDULER_NAME is one of Detectron2's, "WarmupMultiStepLR" (0.1x at STEPS) or "WarmupCosineLR"
    # (to BASE_LR_END), or "WarmupFlatCosineLR" (DEIM, 2412.04234): BASE_LR until FLAT_ITERS, a cosine
    # to BASE_LR_END, and that for the last FINAL_ITERS. WARMUP_METHOD may then also be "quadratic".
    cfg.SOLVER.FLAT_ITERS = 0
    cfg.SOLVER.FINAL_ITERS = 0
    # A moving average of the weights, evaluated beside them (metrics "ema/bbox/AP", ...) and saved
    # in every checkpoint: MODEL.WEIGHTS "model_final.pth@ema" reads it. After the update u it keeps
    # the share DECAY * (1 - exp(-u / WARMUP)) of itself, so that it soon forgets the random start.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9997
    cfg.SOLVER.EMA.WARMUP = 2000
    # Saves model_best.pth whenever this metric of the evaluation ("bbox/AP", "ema/bbox/AP", ...) is
    # better than ever before: higher, or with MODE "min" lower. "": not at all.
    cfg.TEST.BEST = CfgNode()
    cfg.TEST.BEST.METRIC = ""
    cfg.TEST.BEST.MODE = "max"
    # Ends the training when this metric has not been better in PATIENCE evaluations. "": never.
    cfg.TEST.EARLY_STOP = CfgNode()
    cfg.TEST.EARLY_STOP.METRIC = ""
    cfg.TEST.EARLY_STOP.MODE = "max"
    cfg.TEST.EARLY_STOP.PATIENCE = 5
    # The instruments of DN-DETR after every evaluation: how many queries of an image have another
    # object than at the evaluation before ("matching/instability"), and how far the initial
    # references are from the objects that they are matched with ("matching/anchor_distance", in
    # image sides; absent where queries start without one). On so many images of the first dataset
    # of DATASETS.TEST, spread evenly; 0: all.
    cfg.TEST.INSTABILITY = CfgNode()
    cfg.TEST.INSTABILITY.ENABLED = False
    cfg.TEST.INSTABILITY.NUM_IMAGES = 0
    # Activation checkpointing: the layers of these parts, of "backbone", "encoder" and "decoder", keep
    # only their inputs and are computed again in the backward pass: less memory, same losses.
    cfg.MODEL.DN_DETR.RECOMPUTE = []
    # torch.compile of the core in training, by this backend ("inductor"); "": none. Set PAD_OBJECTS_TO
    # to 8 or so with it, for few compilations.
    cfg.MODEL.DN_DETR.COMPILE = ""
    # Same seed, same run: data, augmentation and noise follow from it and from the iteration, so
    # that a resumed training continues as if it had never stopped. -1: another one every time, which
    # checkpoints keep for resuming.
    cfg.SEED = 42
    # Only algorithms that give the same numbers every time, which the CPU's do anyway: on a GPU
    # slower, and an error where PyTorch has none.
    cfg.DETERMINISTIC = False
    # Weights & Biases (pip install wandb) beside metrics.json and TensorBoard, with all that they
    # hold; NAME "": that of the folder. One run for each OUTPUT_DIR, also after resuming.
    cfg.WANDB = CfgNode()
    cfg.WANDB.ENABLED = False
    cfg.WANDB.PROJECT = "dn_detr"
    cfg.WANDB.NAME = ""
    # Iterations between two lines in the log, metrics.json and TensorBoard, which hold the medians
    # of the losses over these iterations; with 1, metrics.json holds every loss of every iteration.
    cfg.LOG_PERIOD = 20
