"""The one exception for input that is at fault: data, file names and config values of the user."""

_MARK = "dn_detr.errors.InputError: "


def sentence_in(text):
    """The InputError's own sentence inside a formatted traceback; None if there is none.

    Errors that cross a process border (DataLoader workers, `launch`) arrive as such text.
    """
    if _MARK not in text:
        return None
    return text.rpartition(_MARK)[2].strip().splitlines()[0]


class InputError(ValueError):
    """The user's input is at fault; the message is one readable sentence that names the fix.

    `train_net.py` prints it without a traceback and exits with 1. The message stays that sentence
    when the error comes out of a DataLoader worker, where torch re-raises it with the worker's
    whole traceback as its text.
    """

    def __init__(self, sentence):
        super().__init__(sentence_in(sentence) or sentence)
