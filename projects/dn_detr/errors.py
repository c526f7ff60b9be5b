"""The one exception for input that is at fault: data, file names and config values of the user."""

import re

_MARK = re.compile(r"dn_detr\.errors\.\w+: ")


def sentence_in(text: str) -> str | None:
    """The InputError's own sentence inside a formatted traceback; None if there is none.

    Errors that cross a process border (DataLoader workers, `launch`) arrive as such text.
    """
    parts = _MARK.split(text)
    return parts[-1].strip().splitlines()[0] if len(parts) > 1 else None


class InputError(ValueError):
    """The user's input is at fault; the message is one readable sentence that names the fix.

    `train_net.py` prints it without a traceback and exits with 1. The message stays that sentence
    when the error comes out of a DataLoader worker, where torch re-raises it with the worker's
    whole traceback as its text.
    """

    def __init__(self, sentence: str):
        super().__init__(sentence_in(sentence) or sentence)


class NotFinite(InputError, FloatingPointError):
    """A loss of a training was not a finite number; the sentence says where, and what to do."""


class RemoteInputError(InputError):
    """An InputError of another process, which says it: this one only ends."""
