"""What one process does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from detectron2.utils import comm

from dn_detr.errors import InputError

T = TypeVar("T")


def on_main(function: Callable[[], T]) -> T:
    """The result of `function`, which the first process alone calls; every process must come here.

    If it raises an InputError, every process does, so that none waits for another that has ended.
    """
    outcome: tuple[T | None, InputError | None] = (None, None)
    if comm.is_main_process():
        try:
            outcome = (function(), None)
        except InputError as error:
            outcome = (None, error)
    result, error = comm.all_gather(outcome)[0]
    if error is not None:
        raise error
    return result
