"""Exceptions for invalid user input: data, file names and configuration values."""

import re

_MARK = re.compile(r"dn_detr\.errors\.\w+: ")


def sentence_in(text: str) -> str | None:
    """Extract the message of an InputError from a formatted traceback, None if there is none.

    Errors of other processes (DataLoader workers, `launch`) arrive as such text.
    """
    parts = _MARK.split(text)
    return parts[-1].strip().splitlines()[0] if len(parts) > 1 else None


class InputError(ValueError):
    """Invalid user input; the message is one readable sentence that names the fix.

    `train_net.py` prints the message without a traceback and exits with status 1. When torch
    re-raises the error of a DataLoader worker with the traceback of the worker as its message, only
    the sentence is kept.
    """

    def __init__(self, sentence: str):
        super().__init__(sentence_in(sentence) or sentence)


class BadImage(InputError):
    """An image file that cannot be used; DATALOADER.BAD_IMAGES says what a training does then."""


class NotFinite(InputError, FloatingPointError):
    """A training loss is NaN or infinite; the message names the location and the fix."""


class RemoteInputError(InputError):
    """Raised when another process reports the error; this one exits silently."""
