"""Work of the main rank for all ranks, and errors of one rank raised on all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from detectron2.utils import comm
from torch import distributed

from dn_detr.errors import InputError, RemoteInputError

T = TypeVar("T")


def raise_on_all_ranks(function: Callable[[], T]) -> T:
    """Call `function` on every rank, and raise on all ranks if one of them gets an InputError.

    An OSError, of a file or disk, becomes one. No rank then waits for one that has ended. Every
    rank must call this, and `function` itself must not wait for other ranks.

    Returns:
        The result of `function` on this rank.

    Raises:
        InputError: On the lowest rank whose call raised it.
        RemoteInputError: On all other ranks, with the same text.
    """
    result, error = None, None
    try:
        result = function()
    except InputError as caught:
        error = caught
    except OSError as caught:
        error = InputError(f"files cannot be written or read: {caught}.")
    if not _any_rank(error is not None):
        return result
    messages = comm.all_gather(None if error is None else str(error))
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed[0] == comm.get_rank():
        raise error
    raise RemoteInputError(messages[failed[0]])


def run_on_main_rank(function: Callable[[], T]) -> T:
    """Call `function` on the main rank and return its result on every rank.

    Every rank must call this. An InputError is raised on all, as by `raise_on_all_ranks`.
    """
    result = raise_on_all_ranks(lambda: function() if comm.is_main_process() else None)
    return comm.all_gather(result)[0]


def set_timeout(timeout: timedelta) -> None:
    """Set how long a process waits for others before it takes them for lost."""
    if comm.get_world_size() > 1:
        for group in {distributed.group.WORLD, comm._get_global_gloo_group()}:
            distributed.distributed_c10d._set_pg_timeout(timeout, group)


def _any_rank(flag: bool) -> bool:
    """Return whether `flag` is set on any rank; waits for other ranks, but not for the device."""
    if comm.get_world_size() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.int32)
    distributed.all_reduce(flags, group=comm._get_global_gloo_group())
    return bool(flags)
