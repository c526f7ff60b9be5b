import pytest
import torch

from dn_detr.d2.errors import InputError, sentence_in


class _Failing(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        try:
            raise OSError("no such file")
        except OSError as error:
            raise InputError(f"a.jpg of image {index} cannot be read: fix it.") from error


@pytest.mark.parametrize("num_workers", [0, 2])
def test_message_out_of_a_data_loader_is_the_sentence_alone(num_workers):
    with pytest.raises(InputError) as caught:
        list(torch.utils.data.DataLoader(_Failing(), num_workers=num_workers))
    assert str(caught.value) == "a.jpg of image 0 cannot be read: fix it."


def test_text_without_an_input_error_has_no_sentence():
    assert sentence_in("ValueError: x") is None
