"""Exceptions for invalid user input: data, file names and configuration values."""

import re

_MARK = re.compile(r"dn_detr\.errors\.\w+: ")


def sentence_in(text: str) -> str | None:
    """Extract the message of an InputError from a formatted traceback, None if there is none.

    Errors of other processes (DataLoader workers, `launch`) arrive as such text.
    """
    parts = _MARK.split(text)
    return parts[-1].strip().splitlines()[0] if len(parts) > 1 else None


def on_one_line(text: str, longest: int = 400) -> str:
    """Return text without control characters; if it is too long, its middle is left out."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (longest - head - 5) :]}"


def quoted(value: object, longest: int = 80) -> str:
    """Return a value of the user's as part of a message."""
    try:
        return on_one_line(str(value) if isinstance(value, Exception) else repr(value), longest)
    except ValueError:  # an int of thousands of digits
        return f"<{type(value).__name__}>"


class InputError(ValueError):
    """Invalid user input; the message is one readable sentence that names the fix.

    The message is one line of at most `longest` characters without control characters.
    `train_net.py` prints the message without a traceback and exits with status 1. When torch
    re-raises the error of a DataLoader worker with the traceback of the worker as its message, only
    the sentence is kept.
    """

    def __init__(self, sentence: str, longest: int = 400):
        super().__init__(on_one_line(sentence_in(sentence) or sentence, longest))


class BadImage(InputError):
    """An image file that cannot be used; DATALOADER.BAD_IMAGES says what a training does then."""


class NotFinite(InputError, FloatingPointError):
    """A training loss is NaN or infinite; the message names the location, the fix and all losses,
    whose names make it longer than others.
    """

    def __init__(self, sentence: str):
        super().__init__(sentence, longest=20_000)


class RemoteInputError(InputError):
    """Raised when another process reports the error; this one exits silently."""
