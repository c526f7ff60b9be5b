"""Where the queries of Mask2Former look (2112.01527, sec. 3.2.1 and 3.2.2)."""

from __future__ import annotations

import torch

from dn_detr.methods.mask2former import level_of, masked_attention_mask


def test_a_query_looks_inside_of_its_mask_and_everywhere_if_that_is_nowhere():
    mask = torch.tensor(
        [
            [0.0, -1.0, 2.0, -3.0],  # two cells
            [-1.0, -1.0, -1.0, -1.0],  # none
            [-1.0, -1.0, -1.0, 5.0],  # one, in the padding
        ]
    )
    padding = torch.tensor([[False, False, False, True]])
    seen = masked_attention_mask(mask[None], padding, torch.float32)[0, 0] == 0
    assert seen.tolist() == [[True, False, True, False], [True] * 4, [True] * 4]


def test_layers_look_at_levels_in_turn_the_coarsest_first():
    assert [level_of(layer, num_levels=3) for layer in range(5)] == [2, 1, 0, 2, 1]
