#!/usr/bin/env python
"""Train and evaluate detectors.

    python train_net.py --config-file configs/dn_deformable.yaml --num-gpus 8
    python train_net.py --eval-only MODEL.WEIGHTS output/dn_deformable/model_final.pth
    torchrun --nproc-per-node 8 train_net.py --config-file configs/dn_deformable.yaml

Trailing KEY VALUE pairs override the configuration.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback

try:
    import dn_detr.d2  # noqa: F401
except ImportError as error:  # or the operators were built for another torch
    missing = {
        "dn_detr": "dn_detr is not installed: run `pip install -e .` in the folder of train_net.py",
        "torch": "torch is not installed: run `pip install torch torchvision`",
    }
    sys.exit(f"train_net.py: {missing.get(error.name, error)} (README.md, Install).")

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.data.catalog import prepare
from dn_detr.d2.data.summary import check_once
from dn_detr.d2.engine.checkpoint import Checkpointer
from dn_detr.d2.engine.collective import raise_on_all_ranks
from dn_detr.d2.engine.trainer import Trainer, use_deterministic_algorithms
from dn_detr.d2.inference.saved_detector import read_evaluation_config
from dn_detr.errors import InputError, RemoteInputError, sentence_in
from dn_detr.ops.extension import slow_sentence

INTERRUPTED = 130
"""The exit status that shells give to what Ctrl-C has ended."""


def setup(args) -> CfgNode:
    """Return the frozen configuration of this run; register datasets and set up logging."""
    read = read_evaluation_config if args.eval_only else read_config
    cfg = read(args.config_file, args.opts)
    is_resumed = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if args.eval_only and not cfg.MODEL.WEIGHTS and not is_resumed:
        raise InputError(
            "--eval-only needs the weights of a detector: set MODEL.WEIGHTS, e.g. MODEL.WEIGHTS "
            f"{os.path.join(cfg.OUTPUT_DIR, 'model_final.pth')}."
        )
    if args.num_gpus == 0 or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    prepare(cfg, eval_only=args.eval_only)
    cfg.freeze()
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR cannot be made: {error}.") from error
    default_setup(cfg, args)
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="dn_detr")
    if sentence := slow_sentence(torch.device(cfg.MODEL.DEVICE).type):
        logger.warning(sentence)
    return cfg


def main(args) -> dict | None:
    """Train, or only evaluate; return metrics if there are any."""
    cfg = check_once(raise_on_all_ranks(lambda: setup(args)), eval_only=args.eval_only)
    if args.eval_only:
        if cfg.DETERMINISTIC:
            use_deterministic_algorithms()
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
    """Run `main` in a process of torchrun."""
    use_gpu = args.num_gpus > 0 and torch.cuda.is_available()
    num_processes = int(os.environ["LOCAL_WORLD_SIZE"])
    if use_gpu:
        check_num_gpus(num_processes)
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if use_gpu else "gloo")
    comm.create_local_process_group(num_processes)
    try:
        return main(args)
    finally:
        torch.distributed.destroy_process_group()


def check_num_gpus(wanted: int) -> None:
    available = torch.cuda.device_count()
    if wanted > available:
        instead = f"--num-gpus {available}" + (", the CPU" if available == 0 else "")
        raise InputError(
            f"--num-gpus is {wanted}, but this machine has {available} GPUs: use {instead}."
        )


def check_machines(args) -> None:
    """Reject arguments that `launch` does not support on several machines."""
    if not 0 <= args.machine_rank < args.num_machines:
        raise InputError(
            f"--machine-rank must be in [0, {args.num_machines}), one for each of --num-machines, "
            f"got {args.machine_rank}."
        )
    if args.num_gpus == 0:
        raise InputError("several machines without GPUs need torchrun, see docs/training.md.")
    if args.dist_url == "auto" or "127.0.0.1" in args.dist_url:
        raise InputError(
            "--dist-url must be the address of the first machine for all others, e.g. "
            f"tcp://10.0.0.1:29500, got {args.dist_url!r}."
        )


def run(args) -> dict | None:
    """Start the processes given by the arguments."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return main_under_torchrun(args)
    if args.num_gpus == 1 and not torch.cuda.is_available():
        print("train_net.py: no GPU found, running on the CPU", file=sys.stderr)
        args.num_gpus = 0
    check_num_gpus(args.num_gpus)
    if args.num_machines > 1:
        check_machines(args)
    return launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def invoke_main(arguments: list[str] | None = None) -> None:
    """Run with these command-line arguments; input errors end it with a one-sentence message."""
    try:
        run(default_argument_parser().parse_args(arguments))
    except RemoteInputError:
        sys.exit(1)
    except InputError as error:
        sys.exit(f"train_net.py: {error}")
    except KeyboardInterrupt:
        print(
            "train_net.py: stopped; --resume continues from the newest checkpoint.", file=sys.stderr
        )
        sys.exit(INTERRUPTED)
    except torch.multiprocessing.ProcessRaisedException as error:
        # A process started by `launch` failed; its exception is passed on as text.
        sentence = sentence_in(str(error))
        if sentence is None:
            raise
        sys.exit(f"train_net.py: {sentence}")


def invoke_main_and_leave() -> None:
    """Run `invoke_main` as a process of torchrun, and exit with its status.

    Skips Python's finalization, in which a thread of gloo that releases a Python object aborts the
    process ("terminate called without an active exception").
    """
    status = 0
    try:
        invoke_main()
    except SystemExit as ended:  # as Python would take it
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        invoke_main_and_leave()
    invoke_main()
