"""Dense, conditional and row-column attention against plain loops."""

from __future__ import annotations

import pytest
import torch

from dn_detr.layers.initialization import xavier_fused_
from dn_detr.layers.multihead_attention import (
    ConditionalCrossAttention,
    ConditionalPosition,
    DenseAttention,
    SplitSelfAttention,
    attend_densely,
)
from dn_detr.layers.query_attention import QueryAttentionMask
from dn_detr.layers.row_column_attention import RowColumnAttention
from dn_detr.structures import Memory, Segment

CHANNELS, HEADS = 8, 2


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def loop(q, k, v, heads, padding, prior=None):
    """Attention query by query, head by head; head h owns the h-th run of channels."""
    batch, queries = q.shape[:2]
    out = torch.zeros(batch, queries, v.shape[-1], dtype=q.dtype)
    width, value_width = q.shape[-1] // heads, v.shape[-1] // heads
    for b in range(batch):
        for h in range(heads):
            of = slice(h * width, (h + 1) * width)
            for i in range(queries):
                scores = k[b, :, of] @ q[b, i, of] / width**0.5
                if prior is not None:
                    scores = scores + prior[b, h, i]
                scores[padding[b]] = -torch.inf
                value = v[b, :, h * value_width : (h + 1) * value_width]
                out[b, i, h * value_width : (h + 1) * value_width] = scores.softmax(0) @ value
    return out


@pytest.mark.parametrize("has_prior", [False, True])
def test_dense_attention_is_that_of_a_loop(has_prior):
    """With queries and keys twice as wide as the values, as in conditional attention."""
    q, k, v = randn(2, 3, 16), randn(2, 5, 16), randn(2, 5, CHANNELS)
    padding = torch.tensor([[False] * 5, [False, True, False, True, True]])
    prior = randn(2, HEADS, 3, 5) if has_prior else None
    found = attend_densely(q, k, v, HEADS, padding, prior=prior)
    torch.testing.assert_close(found, loop(q, k, v, HEADS, padding, prior))


def test_dense_attention_projects_like_torch():
    attention = DenseAttention(channels=CHANNELS, num_heads=HEADS, dropout=0.0).double()
    reference = torch.nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True).double()
    parts = (attention.q, attention.k, attention.v)
    reference.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
    reference.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
    reference.out_proj.load_state_dict(attention.out.state_dict())
    query, key, value = randn(2, 3, CHANNELS), randn(2, 5, CHANNELS), randn(2, 5, CHANNELS)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    expected, _ = reference(query, key, value, key_padding_mask=padding)
    torch.testing.assert_close(attention(query, key, value, padding), expected)


def test_fused_initialisation_is_that_of_one_tall_matrix():
    linears = [torch.nn.Linear(64, 64) for _ in range(3)]
    xavier_fused_(linears)
    bound = (6 / (64 + 192)) ** 0.5
    values = torch.cat([linear.weight.flatten() for linear in linears])
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.99 * bound


def memory_of(tokens, position, padding):
    sizes = torch.full((tokens.shape[0], 1, 2), 2.0, dtype=tokens.dtype)
    return Memory(tokens, position, padding, ((2, tokens.shape[1] // 2),), sizes)


@pytest.mark.parametrize("is_first", [False, True])
def test_conditional_attention_adds_the_scores_of_content_and_place(is_first):
    """2108.06152, eq. 4: the score of a pair is content . content + place . place."""
    attention = ConditionalCrossAttention(
        channels=CHANNELS, num_heads=HEADS, dropout=0.0, is_first=is_first
    ).double()
    content, spatial, learned = (randn(1, 3, CHANNELS) for _ in range(3))
    memory = memory_of(randn(1, 4, CHANNELS), randn(1, 4, CHANNELS), torch.zeros(1, 4).bool())
    found = attention(content, ConditionalPosition(spatial, learned), None, memory)

    q, k = attention.content_q(content), attention.content_k(memory.tokens)
    place_q, place_k = attention.spatial_q(spatial), attention.position_k(memory.position)
    if is_first:
        q, k = q + attention.learned_q(learned), k + place_k
    width = CHANNELS // HEADS
    out = torch.zeros(1, 3, CHANNELS, dtype=torch.float64)
    for h in range(HEADS):
        of = slice(h * width, (h + 1) * width)
        scores = q[..., of] @ k[..., of].mT + place_q[..., of] @ place_k[..., of].mT
        weights = (scores / (2 * width) ** 0.5).softmax(-1)
        out[..., of] = weights @ attention.v(memory.tokens)[..., of]
    torch.testing.assert_close(found, attention.out(out))


def test_split_self_attention_adds_projected_content_and_position():
    layer = SplitSelfAttention(channels=CHANNELS, num_heads=HEADS, dropout=0.0).double()
    content, position = randn(2, 3, CHANNELS), randn(2, 3, CHANNELS)
    segments = (Segment("match", 3),)
    query_mask = QueryAttentionMask(segments, device=torch.device("cpu"), dtype=torch.float64)
    q = layer.content_q(content) + layer.position_q(position)
    k = layer.content_k(content) + layer.position_k(position)
    update = layer.out(loop(q, k, layer.v(content), HEADS, torch.zeros(2, 3).bool()))
    expected = layer.norm(content + update)
    torch.testing.assert_close(layer(content, position, query_mask), expected)


def test_row_column_attention_is_that_of_a_loop():
    """2109.07107, eq. 4 to 6, with means over the cells that are not padding."""
    layer = RowColumnAttention(channels=CHANNELS, num_heads=HEADS, dropout=0.0).double()
    height, width, queries = 3, 4, 2
    query, tokens = randn(1, queries, CHANNELS), randn(1, height, width, CHANNELS)
    of_x, of_y = randn(1, queries, CHANNELS), randn(1, queries, CHANNELS)
    columns, rows = randn(1, width, CHANNELS), randn(1, height, CHANNELS)
    padding = torch.zeros(1, height, width, dtype=torch.bool)
    padding[:, 2:], padding[:, :, 3:] = True, True  # 2 rows and 3 columns are left
    found = layer(query, (of_x, of_y), tokens, (columns, rows), padding)

    mean_of_column = tokens[0, :2, :3].mean(0) + columns[0, :3]
    mean_of_row = tokens[0, :2, :3].mean(1) + rows[0, :2]
    size = CHANNELS // HEADS
    out = torch.zeros(1, queries, CHANNELS, dtype=torch.float64)
    for i in range(queries):
        for h in range(HEADS):
            of = slice(h * size, (h + 1) * size)
            q_x, q_y = layer.x_q(query[0, i] + of_x[0, i]), layer.y_q(query[0, i] + of_y[0, i])
            along_x = (layer.x_k(mean_of_column)[:, of] @ q_x[of] / size**0.5).softmax(0)
            along_y = (layer.y_k(mean_of_row)[:, of] @ q_y[of] / size**0.5).softmax(0)
            for y in range(2):
                for x in range(3):
                    value = layer.v(tokens[0, y, x])[of]
                    out[0, i, of] += along_y[y] * along_x[x] * value
    torch.testing.assert_close(found, layer.out(out))
