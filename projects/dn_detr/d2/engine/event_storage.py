"""Detectron2's event storage that forgets what no writer reads any more."""

from __future__ import annotations

from collections import defaultdict

from detectron2.utils.events import EventStorage
from fvcore.common.history_buffer import HistoryBuffer


class BoundedEventStorage(EventStorage):
    """Keeps the last `window` values of each scalar; Detectron2's keeps a million.

    Args:
        start_iter: First iteration.
        window: Values of a scalar that writers take medians of, at most.
    """

    def __init__(self, start_iter: int, window: int):
        super().__init__(start_iter)
        self._history = defaultdict(lambda: HistoryBuffer(max_length=window))
