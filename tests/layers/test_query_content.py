"""Content that matched queries share, as in DN-DETR."""

from __future__ import annotations

import torch

from dn_detr.layers.query_content import QueryContent, SharedContent


def test_training_never_moves_the_indicator_of_shared_content():
    """The indicator of matched queries is the constant 0 (2203.01305, sec. 4.3)."""
    torch.manual_seed(0)
    content = QueryContent(channels=8, num_classes=3, has_labels=True, has_indicator=True)
    shared = SharedContent(content=content, is_learned=True, num_patterns=0)
    shared.row.data += 1
    found, _ = shared(torch.zeros(5, 4))
    assert (found[:, :-1] != 0).all() and (found[:, -1] == 0).all()
    found.sum().backward()
    assert shared.row.grad[0, :-1].tolist() == [5.0] * 7 and shared.row.grad[0, -1] == 0
