"""What one process does for all, and how an error of one becomes an error of all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from detectron2.utils import comm
from torch import distributed

from dn_detr.errors import InputError, RemoteInputError

T = TypeVar("T")


def together(function: Callable[[], T]) -> T:
    """The result of `function`, which every process calls; every process must come here.

    If it raises an InputError in one of them, every process raises one, so that none waits for
    another that has ended: the first that has one its own, all others RemoteInputError. While one
    process may have raised, `function` must not wait for others.
    """
    result, error = None, None
    try:
        result = function()
    except InputError as caught:
        error = caught
    if not _anywhere(error is not None):
        return result
    sentences = comm.all_gather(None if error is None else str(error))
    failed = [rank for rank, sentence in enumerate(sentences) if sentence is not None]
    if failed[0] == comm.get_rank():
        raise error
    raise RemoteInputError(sentences[failed[0]])


def on_main(function: Callable[[], T]) -> T:
    """The result of `function`, which the first process alone calls; every process must come here.

    If it raises an InputError, every process does, as in `together`.
    """
    result = together(lambda: function() if comm.is_main_process() else None)
    return comm.all_gather(result)[0]


def _anywhere(flag: bool) -> bool:
    """Whether `flag` is set in any process. Waits for the others, but not for the device."""
    if comm.get_world_size() == 1:
        return flag
    flags = torch.tensor([flag], dtype=torch.int32)
    distributed.all_reduce(flags, group=_host_group())
    return bool(flags)


@cache
def _host_group() -> distributed.ProcessGroup | None:
    """All processes, for what lies in host memory; None: the default group can do that."""
    return distributed.new_group(backend="gloo") if distributed.get_backend() == "nccl" else None
