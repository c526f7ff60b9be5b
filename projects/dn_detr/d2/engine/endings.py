"""Ends of a training before its last iteration: signals, lost processes, full disks."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch
from detectron2.utils import comm

from dn_detr.errors import InputError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Requests to save and end; SIGUSR1 is Slurm's `--signal=USR1@<seconds>`."""

_SAME_REQUEST = 0.5
"""Seconds in which further signals are the same request: Ctrl-C reaches a process directly and
again through the program that started it."""


class Stopped(Exception):
    """Raised to end a training that was asked to; `status` is the exit status of shells."""

    def __init__(self, signum: int, sentence: str = ""):
        super().__init__(sentence)
        self.signum = signum
        self.status = 128 + signum


class StopRequests:
    """Context that notes SIGNALS instead of dying from them; a second one ends the process at once.

    Signals that are ignored before, as SIGHUP under nohup, stay ignored.
    """

    def __init__(self):
        self.signum: int | None = None
        self.time = 0.0
        self.before: dict = {}

    def __enter__(self):
        self.process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self.before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_error):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, _frame) -> None:
        if os.getpid() != self.process:  # a forked worker, which ends with its owner
            return
        now = time.monotonic()
        if self.signum is None:
            self.signum, self.time = signum, now
            if comm.is_main_process():  # a log may be at work right now
                name = signal.Signals(signum).name
                text = f"{name}: saving after this iteration; a second signal ends at once\n"
                os.write(2, text.encode())
        elif now - self.time > _SAME_REQUEST:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(self.process, signum)

    def flags(self) -> list[float]:
        """Return one number for each of SIGNALS, 1 for what this process has received."""
        return [float(self.signum == signum) for signum in SIGNALS]


def ignore_signals(_worker: int = 0) -> None:
    """Leave it to the main process of a training to end its data workers."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def as_input_error(error: Exception, timeout_minutes: float) -> Exception:
    """Turn a failure of disk or network into one sentence; return other errors as they are."""
    is_of_peers = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
    if isinstance(error, OSError):
        return InputError(f"files cannot be written or read: {error}.")
    if isinstance(error, RuntimeError) and comm.get_world_size() > 1 and is_of_peers:
        return InputError(
            f"rank {comm.get_rank()} has lost another process, which has ended or has not answered "
            f"for PROCESS_TIMEOUT, {timeout_minutes:g} minutes; its own messages tell why."
        )
    return error
