#!/usr/bin/env python
"""Train and evaluate detectors.

    python train_net.py --config-file configs/dn_deformable.yaml --num-gpus 8
    python train_net.py --eval-only MODEL.WEIGHTS output/dn_deformable/model_final.pth
    torchrun --nproc-per-node 8 train_net.py --config-file configs/dn_deformable.yaml

Trailing KEY VALUE pairs override the configuration.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
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
from detectron2.engine import default_argument_parser, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.config.training_defaults import check_values
from dn_detr.d2.data.catalog import prepare
from dn_detr.d2.data.summary import check_once
from dn_detr.d2.engine.checkpoint import AVERAGED, Checkpointer
from dn_detr.d2.engine.collective import raise_on_all_ranks, run_on_main_rank
from dn_detr.d2.engine.endings import SIGNALS, Stopped
from dn_detr.d2.engine.run_folder import checkpoints_in, clear_folder, lock
from dn_detr.d2.engine.trainer import Trainer, use_deterministic_algorithms
from dn_detr.d2.inference.saved_detector import read_evaluation_config
from dn_detr.datasets.cache import replacing
from dn_detr.errors import InputError, RemoteInputError, sentence_in
from dn_detr.ops.extension import slow_sentence

INTERRUPTED = 130
"""The exit status that shells give to what Ctrl-C has ended."""


def argument_parser() -> argparse.ArgumentParser:
    """Return Detectron2's parser with the options of this program."""
    parser = default_argument_parser()
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="discard the checkpoints of an earlier training in OUTPUT_DIR",
    )
    return parser


def setup(args) -> CfgNode:
    """Return the frozen configuration of this run; register datasets and set up logging."""
    read = read_evaluation_config if args.eval_only else read_config
    cfg = read(args.config_file, args.opts)
    check_values(cfg)
    is_resumed = args.resume and bool(checkpoints_in(cfg.OUTPUT_DIR))
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
    return cfg


def open_folder(cfg: CfgNode, args, stack: contextlib.ExitStack) -> str:
    """Lock OUTPUT_DIR for a training and clear what an earlier one left; returns what to log."""
    if args.eval_only:
        return ""
    stack.enter_context(lock(cfg.OUTPUT_DIR))
    weights = cfg.MODEL.WEIGHTS.removesuffix(AVERAGED)
    return clear_folder(
        cfg.OUTPUT_DIR, resume=args.resume, overwrite=args.overwrite, weights=weights
    )


def start_log(cfg: CfgNode, args) -> logging.Logger:
    """Set up logs and random numbers as Detectron2's default_setup, which writes config.yaml."""
    rank = comm.get_rank()
    # A full disk is one error, of a checkpoint or of metrics, not also of logs and TensorBoard.
    logging.raiseExceptions = False
    threading.excepthook = say_no_disk_error
    try:
        for name in ("fvcore", "detectron2", "dn_detr"):
            logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR cannot be written to: {error}.") from error
    logger.info(f"Rank of current process: {rank}. World size: {comm.get_world_size()}")
    logger.info(f"Environment info:\n{collect_env_info()}")
    logger.info(f"Command line arguments: {args}")
    logger.info(f"Running with full config:\n{cfg.dump()}")
    seed_all_rng(None if cfg.SEED < 0 else (cfg.SEED + rank) % 2**32)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only
    if cfg.FLOAT32_PRECISION and torch.cuda.is_available():
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"
    if sentence := slow_sentence(torch.device(cfg.MODEL.DEVICE).type):
        logger.warning(sentence)
    return logger


def say_no_disk_error(args) -> None:
    """Print what ended a thread, unless the main thread raises it again, as TensorBoard's does."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def main(args) -> dict | None:
    """Train, or only evaluate; return metrics if there are any."""
    with contextlib.ExitStack() as stack:
        return run_in_folder(args, stack)


def run_in_folder(args, stack: contextlib.ExitStack) -> dict | None:
    """Run `main` with what must be closed behind it on the stack."""
    cfg = raise_on_all_ranks(lambda: setup(args))
    moved = run_on_main_rank(lambda: open_folder(cfg, args, stack))
    logger = raise_on_all_ranks(lambda: start_log(cfg, args))
    if moved:
        logger.info(moved)
    cfg = check_once(cfg, eval_only=args.eval_only)
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
    run_on_main_rank(lambda: save_config(cfg))
    try:
        return trainer.train()
    except Stopped as stop:
        if comm.is_main_process():
            print(f"train_net.py: {stop}", file=sys.stderr)
        sys.exit(stop.status)


def save_config(cfg: CfgNode) -> None:
    """Write config.yaml, when it is sure that this configuration will be trained."""
    try:
        with replacing(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) as file:
            file.write(cfg.dump().encode())
    except OSError as error:
        raise InputError(f"config.yaml cannot be written to OUTPUT_DIR: {error}.") from error


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
    for signum in SIGNALS if args.num_gpus > 1 else ():
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, pass_on)
    return launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def pass_on(signum: int, _frame) -> None:
    """Hand a signal to the processes that `launch` has started, and wait for them as before."""
    for process in multiprocessing.active_children():
        os.kill(process.pid, signum)


def invoke_main(arguments: list[str] | None = None) -> None:
    """Run with these command-line arguments; input errors end it with a one-sentence message."""
    try:
        run(argument_parser().parse_args(arguments))
    except RemoteInputError:
        sys.exit(1)
    except InputError as error:
        sys.exit(f"train_net.py: {error}")
    except KeyboardInterrupt:
        print("train_net.py: stopped.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except torch.multiprocessing.ProcessExitedException as error:
        # A process that ended by itself has said why.
        sys.exit(error.exit_code if error.exit_code > 0 else f"train_net.py: {error}.")
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
