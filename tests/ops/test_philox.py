"""The random generator against the vectors that its authors published (Random123, kat_vectors)."""

import re
from pathlib import Path

import pytest
import torch

from dn_detr.ops import philox as generator
from dn_detr.ops.philox import philox


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (-1, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors(key, counter, words):
    result = philox(torch.tensor([key]), counter)
    assert " ".join(f"{word.item():08x}" for word in result) == words


def test_counters_and_keys_broadcast():
    keys = torch.tensor([[3], [1 << 40]])
    together = philox(keys, (torch.arange(5), 1, 2, 3))
    for i in range(2):
        for j in range(5):
            alone = philox(keys[i], (torch.tensor([j]), 1, 2, 3))
            assert all(t[i, j] == a[0] for t, a in zip(together, alone, strict=True))


def test_no_two_uses_share_random_words_and_the_kernels_number_them_alike():
    numbers = {name: value for name, value in vars(generator).items() if name.endswith("_DRAW")}
    assert len(numbers) == 4 == len(set(numbers.values()))
    header = Path(__file__).resolve().parents[2] / "csrc/noise_objects.h"
    found = re.findall(r"\b(\w+_DRAW) = (\d+)", header.read_text())
    assert {name: int(value) for name, value in found} == {
        name: numbers[name] for name in ("BOX_DRAW", "LABEL_DRAW")
    }
