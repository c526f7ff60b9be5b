"""Batches of worker processes in one shared buffer, and limits of open files.

torch passes every tensor of a sample as a file descriptor of its own: 8 workers with 64 images need
more than the usual 1024, and where one is missing, a batch is lost and the training waits for ever.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import resource

import torch
from torch import Tensor

from dn_detr.errors import InputError

_ALIGNMENT = 64  # bytes
_MOST_FILES = 65536  # a soft limit that is always enough
_PER_WORKER = 8  # pipes, process and prefetched batches, in the main process
_SPARE = 24  # checkpoints, logs, image files


class _Packer(pickle.Pickler):
    """Pickle without the data of tensors, which `tensors` lists with their places."""

    def __init__(self, file):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, int, Tensor]] = []
        self.size = 0

    def persistent_id(self, value):
        if type(value) is not Tensor or value.device.type != "cpu" or value.requires_grad:
            return None
        start, length = self.size, value.numel() * value.element_size()
        self.tensors.append((start, start + length, value))
        self.size += -(-length // _ALIGNMENT) * _ALIGNMENT
        return start, start + length, value.dtype, tuple(value.shape)


class _Unpacker(pickle.Unpickler):
    def __init__(self, file, buffer: Tensor):
        super().__init__(file)
        self.buffer = buffer

    def persistent_load(self, place):
        start, end, dtype, shape = place
        return self.buffer[start:end].view(dtype).view(shape)


def pack(samples: list[dict]) -> tuple[Tensor, bytes]:
    """Put the tensors of samples into one buffer [bytes] uint8 in shared memory.

    Returns:
        The buffer, and everything else in the form that `unpack` reads.
    """
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(samples)
    # Shared here and not when it is sent: there, an error would be lost together with the batch.
    buffer = torch.empty(max(packer.size, _ALIGNMENT), dtype=torch.uint8).share_memory_()
    for start, end, value in packer.tensors:
        buffer[start:end] = value.reshape(-1).view(torch.uint8)
    return buffer, file.getvalue()


def unpack(buffer: Tensor, content: bytes) -> list[dict]:
    """Return the samples of `pack`; their tensors are views of the buffer, [bytes] uint8."""
    return _Unpacker(io.BytesIO(content), buffer).load()


def allow_open_files(num_workers: int) -> None:
    """Raise the soft limit of open files to the hard one.

    Raises:
        InputError: If that is too low for this many workers.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    needed = len(os.listdir("/dev/fd")) + _PER_WORKER * num_workers + _SPARE
    if num_workers and soft != resource.RLIM_INFINITY and soft < needed:
        raise InputError(_sentence(num_workers))


@contextlib.contextmanager
def about_open_files(num_workers: int):
    """Turn errors of too many open files, also of workers, into an InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        signs = ("Too many open files", "received 0 items of ancdata")
        is_it = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
        if not is_it and not any(sign in str(error) for sign in signs):
            raise
        raise InputError(_sentence(num_workers)) from None


def _sentence(num_workers: int) -> str:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"the limit of {limit} open files (`ulimit -n`) is too low for DATALOADER.NUM_WORKERS "
        f"{num_workers}: raise it, or use fewer workers."
    )
