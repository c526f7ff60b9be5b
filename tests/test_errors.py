import traceback

from dn_detr.errors import InputError, NotFinite, sentence_in


def _traceback_of_a_chained_error():
    try:
        try:
            raise OSError("no such file")
        except OSError as error:
            raise InputError("a.jpg cannot be read: fix it.") from error
    except InputError:
        return traceback.format_exc()


def test_message_made_from_a_worker_s_traceback_is_the_sentence_alone():
    text = _traceback_of_a_chained_error()
    assert sentence_in(text) == "a.jpg cannot be read: fix it."
    again = InputError(f"Caught InputError in DataLoader worker process 0.\nOriginal {text}")
    assert str(again) == "a.jpg cannot be read: fix it."


def test_text_without_an_input_error_has_no_sentence():
    assert sentence_in("ValueError: x") is None
    assert str(InputError("x")) == "x"


def test_a_loss_that_is_not_finite_is_an_error_with_a_sentence():
    try:
        raise NotFinite("loss_bbox is not finite.")
    except FloatingPointError:
        text = traceback.format_exc()
    assert sentence_in(text) == "loss_bbox is not finite."
