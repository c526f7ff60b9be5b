#!/usr/bin/env python
"""Train and evaluate the detectors of dn_detr.

    python train_net.py --config-file configs/dn_deformable.yaml --num-gpus 8
    python train_net.py --config-file configs/dn_deformable.yaml --eval-only MODEL.WEIGHTS model.pth
    torchrun --nproc-per-node 8 train_net.py --config-file configs/dn_deformable.yaml

Trailing KEY VALUE pairs override the configuration.
"""

from __future__ import annotations

import os
import sys

try:
    import detectron2  # noqa: F401
except ImportError:
    sys.exit(
        "train_net.py: Detectron2 is not installed; install it at the tested commit with "
        'pip install --no-build-isolation -e ".[detectron2]"'
    )

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.checkpoint import Checkpointer
from dn_detr.d2.datasets import prepare
from dn_detr.errors import InputError, sentence_in
from dn_detr.d2.report import check_datasets
from dn_detr.d2.trainer import Trainer


def setup(args) -> CfgNode:
    """The frozen configuration of this run; datasets are registered, logging is set up."""
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    try:
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
    except (KeyError, ValueError, AssertionError, OSError) as error:
        raise InputError(f"the configuration cannot be read: {error}") from error
    if args.num_gpus == 0 or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    prepare(cfg, eval_only=args.eval_only)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="dn_detr")
    return cfg


def main(args) -> dict | None:
    """Train, or only evaluate; returns the metrics where there are any."""
    cfg = setup(args)
    check_datasets(cfg, eval_only=args.eval_only)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        Checkpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main_under_torchrun(args) -> dict | None:
    """`main` in one of the processes that torchrun has started."""
    use_gpu = args.num_gpus > 0 and torch.cuda.is_available()
    if use_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if use_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        return main(args)
    finally:
        torch.distributed.destroy_process_group()


def run(args) -> dict | None:
    """Start the processes that the arguments ask for."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return main_under_torchrun(args)
    available = torch.cuda.device_count()
    if args.num_gpus > max(1, available):
        raise InputError(
            f"--num-gpus {args.num_gpus} was asked for, but this machine has {available}"
        )
    if args.num_gpus == 1 and available == 0:
        print("train_net.py: no GPU was found, so this runs on the CPU", file=sys.stderr)
        args.num_gpus = 0
    return launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    try:
        run(default_argument_parser().parse_args())
    except InputError as error:
        sys.exit(f"train_net.py: {error}")
    except torch.multiprocessing.ProcessRaisedException as error:
        # A process started by `launch` failed; its exception arrives as text.
        sentence = sentence_in(str(error))
        if sentence is None:
            raise
        sys.exit(f"train_net.py: {sentence}")
