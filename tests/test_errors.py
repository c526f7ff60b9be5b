import traceback

from dn_detr.errors import InputError, NotFinite, quoted, sentence_in


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


def test_a_loss_that_is_not_finite_keeps_its_place_among_many_losses():
    """The middle of the message says where, and was left out."""
    names = [f"loss_giou_dn_{layer}" for layer in range(60)]
    losses = {name: float("nan") for name in names}
    text = f"not finite: {', '.join(names)}, in image 7: lower the rate; all losses: {losses}"
    assert str(NotFinite(text)) == text


def test_a_message_is_one_line_of_at_most_400_characters_without_control_characters():
    """Names of the user's came out raw: with line breaks, escape codes and right-to-left marks."""
    message = str(InputError(f"a\nb\r\x1b[31m\u202e\u2028\ud800: {'x' * 5000} fix it."))
    assert message.startswith("a b  [31m   : xx") and message.endswith("xx fix it.")
    assert len(message) == 400 and message.isprintable()
    message.encode()  # lone surrogates could not be printed


def test_values_are_quoted_shortly():
    assert quoted("a") == "'a'" and quoted(ValueError("x\ny")) == "x y"
    assert len(quoted("x" * 500)) == 80
    assert quoted(10**9000) == "<int>"  # Python refuses to write it
