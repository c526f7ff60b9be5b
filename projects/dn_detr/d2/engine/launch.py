"""Training and evaluation as a program: from parsed arguments to processes and exit status."""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng

from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.config.recipe import use_recipe
from dn_detr.d2.config.training_defaults import check_values
from dn_detr.d2.data import summary
from dn_detr.d2.data.catalog import prepare
from dn_detr.d2.data.summary import check_once
from dn_detr.d2.engine.checkpoint import AVERAGED, Checkpointer
from dn_detr.d2.engine.collective import raise_on_all_ranks, run_on_main_rank
from dn_detr.d2.engine.endings import SIGNALS, Stopped
from dn_detr.d2.engine.run_folder import checkpoints_in, clear_folder, lock
from dn_detr.d2.engine.trainer import Trainer, use_deterministic_algorithms
from dn_detr.d2.engine.writers import FOR_FILE, held_back, open_log
from dn_detr.d2.inference.saved_detector import read_evaluation_config
from dn_detr.d2.solver.length import scale_learning_rate, use_epochs
from dn_detr.datasets.cache import replacing
from dn_detr.errors import InputError, RemoteInputError, sentence_in
from dn_detr.ops.extension import slow_sentence

logger = logging.getLogger(__name__)

INTERRUPTED = 130
"""The exit status that shells give to what Ctrl-C has ended."""


def setup(args: Namespace) -> tuple[CfgNode, list[str]]:
    """Read and complete the configuration of this run, and register its datasets.

    Returns:
        The frozen configuration, and sentences on what was derived from the data.
    """
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
    said = [] if args.eval_only else complete(cfg, args)
    cfg.freeze()
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR cannot be made: {error}.") from error
    return cfg, said


def complete(cfg: CfgNode, args: Namespace) -> list[str]:
    """Set what follows from the training data, in place; return a sentence for each."""
    given, said = set(args.opts[::2]), []
    if getattr(args, "recipe", ""):
        said += use_recipe(cfg, given)
    if getattr(args, "adapts", False):
        said += scale_learning_rate(cfg, read_config(args.config_file, []), given)
        if not cfg.TEST.BEST.METRIC and cfg.TEST.EVAL_PERIOD:
            cfg.TEST.BEST.METRIC = "bbox/AP"
    return [*said, *use_epochs(cfg, given)]


def open_folder(cfg: CfgNode, args: Namespace, stack: contextlib.ExitStack) -> str:
    """Lock OUTPUT_DIR for a training and clear what an earlier one left; returns what to log."""
    if args.eval_only:
        return ""
    stack.enter_context(lock(cfg.OUTPUT_DIR))
    weights = cfg.MODEL.WEIGHTS.removesuffix(AVERAGED)
    return clear_folder(
        cfg.OUTPUT_DIR, resume=args.resume, overwrite=args.overwrite, weights=weights
    )


def start_log(cfg: CfgNode, args: Namespace, stack: contextlib.ExitStack) -> None:
    """Set up logs, until the stack ends, and random numbers, as Detectron2's default_setup."""
    rank = comm.get_rank()
    # A full disk is one error, of a checkpoint or of metrics, not also of logs and TensorBoard.
    logging.raiseExceptions = False
    threading.excepthook = say_no_disk_error
    try:
        stack.callback(open_log(cfg.OUTPUT_DIR, rank))
    except OSError as error:
        raise InputError(f"OUTPUT_DIR cannot be written to: {error}.") from error
    logger.info(f"Rank of current process: {rank}. World size: {comm.get_world_size()}", **FOR_FILE)
    logger.info(f"Environment info:\n{collect_env_info()}", **FOR_FILE)
    logger.info(f"Command line arguments: {args}", **FOR_FILE)
    logger.info(f"Running with full config:\n{cfg.dump()}", **FOR_FILE)
    seed_all_rng(None if cfg.SEED < 0 else (cfg.SEED + rank) % 2**32)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only
    if cfg.FLOAT32_PRECISION and torch.cuda.is_available():
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"
    if sentence := slow_sentence(torch.device(cfg.MODEL.DEVICE).type):
        logger.warning(sentence)


def say_no_disk_error(args) -> None:
    """Print what ended a thread, unless the main thread raises it again, as TensorBoard's does."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def main(args: Namespace) -> dict | None:
    """Train, or only evaluate; return metrics if there are any."""
    with contextlib.ExitStack() as stack:
        return run_in_folder(args, stack)


def run_in_folder(args: Namespace, stack: contextlib.ExitStack) -> dict | None:
    """Run `main` with what must be closed behind it on the stack."""
    cfg, said = raise_on_all_ranks(lambda: setup(args))
    moved = run_on_main_rank(lambda: open_folder(cfg, args, stack))
    raise_on_all_ranks(lambda: start_log(cfg, args, stack))
    for sentence in filter(None, (moved, *said)):
        logger.info(sentence)
    if args.eval_only:
        cfg = check_once(cfg, eval_only=True)
        if cfg.DETERMINISTIC:
            use_deterministic_algorithms()
        model = Trainer.build_model(cfg)
        Checkpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    report = stack.enter_context(held_back(summary.logger))
    cfg = check_once(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    run_on_main_rank(lambda: save_config(cfg))
    report()
    try:
        results = trainer.train()
    except Stopped as stop:
        if comm.is_main_process():
            print(f"{args.program}: {stop}", file=sys.stderr)
        sys.exit(stop.status)
    logger.info(next_steps(cfg.OUTPUT_DIR))
    return results


def best_weights(folder: str) -> str:
    """Return the best weights that a finished training has left, else the last ones."""
    best = os.path.join(folder, "model_best.pth")
    return best if os.path.isfile(best) else os.path.join(folder, "model_final.pth")


def next_steps(folder: str) -> str:
    """Say where the weights of a finished training are, and what to do with them."""
    weights = best_weights(folder)
    kind = "best" if weights.endswith("model_best.pth") else "last"
    return (
        f"the {kind} weights: {weights}; next:\n"
        f"  dn-detr predict PICTURES --weights {weights} --output found\n"
        f"  dn-detr eval --weights {weights} --report\n"
        f"  dn-detr plot {folder}"
    )


def save_config(cfg: CfgNode) -> None:
    """Write config.yaml, when it is sure that this configuration will be trained."""
    try:
        with replacing(os.path.join(cfg.OUTPUT_DIR, "config.yaml")) as file:
            file.write(cfg.dump().encode())
    except OSError as error:
        raise InputError(f"config.yaml cannot be written to OUTPUT_DIR: {error}.") from error


def is_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def main_under_torchrun(args: Namespace) -> dict | None:
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
    if wanted < 0:
        raise InputError(f"--num-gpus must be at least 0, got {wanted}.")
    if wanted > available:
        instead = f"--num-gpus {available}" + (", the CPU" if available == 0 else "")
        raise InputError(
            f"--num-gpus is {wanted}, but this machine has {available} GPUs: use {instead}."
        )


def check_machines(args: Namespace) -> None:
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


def choose_num_gpus(args: Namespace) -> int:
    """Return the GPUs to use where none are asked for: the most that share a batch evenly."""
    available = torch.cuda.device_count()
    if available > 1:
        batch = setup(args)[0].SOLVER.IMS_PER_BATCH
        available = next(n for n in range(available, 0, -1) if batch % n == 0)
    print(f"{args.program}: running on {f'{available} GPUs' if available else 'the CPU'}")
    return available


def run(args: Namespace) -> dict | None:
    """Start the processes given by the arguments.

    Args:
        args: those of Detectron2's parser (num_gpus None: what there is), "program" for messages,
            "overwrite"; optional "recipe" and "adapts", see `complete`.
    """
    if is_torchrun():
        return main_under_torchrun(args)
    if args.num_gpus is None:
        args.num_gpus = choose_num_gpus(args)
    elif args.num_gpus == 1 and not torch.cuda.is_available():
        print(f"{args.program}: no GPU found, running on the CPU", file=sys.stderr)
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


def invoke(function: Callable, args: Namespace, program: str):
    """Return function(args) as a program: input errors end it with a one-sentence message.

    Args:
        function: `run`, or a command that is no training.
        args: its arguments; gets "program".
        program: name for messages.
    """
    args.program = program
    try:
        return function(args)
    except RemoteInputError:
        sys.exit(1)
    except InputError as error:
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        print(f"{program}: stopped.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except torch.multiprocessing.ProcessExitedException as error:
        # A process that ended by itself has said why.
        sys.exit(error.exit_code if error.exit_code > 0 else f"{program}: {error}.")
    except torch.multiprocessing.ProcessRaisedException as error:
        # A process started by `launch` failed; its exception is passed on as text.
        sentence = sentence_in(str(error))
        if sentence is None:
            raise
        sys.exit(f"{program}: {sentence}")


def leave_after(program: Callable[[], None]) -> None:
    """Run a program as a process of torchrun, and exit with its status.

    Skips Python's finalization, in which a thread of gloo that releases a Python object aborts the
    process ("terminate called without an active exception").
    """
    status = 0
    try:
        program()
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
