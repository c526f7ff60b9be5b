"""Starting values of every parameter, beside the authors' models in the published size.

Three models on either side, each with a seed of its own. Values that are the same in all three of
theirs are constants and must be ours exactly. The n others of a tensor are samples: means may
differ by ERRORS standard errors s * sqrt(2 / n), standard deviations by the factor
1 +- ERRORS / sqrt(n). (The logarithm of the ratio of two standard deviations of n values each has
the variance (kurtosis - 1) / 2n, at most 1 / n for uniform and normal values.) For a matrix of
256 x 256, that is 1 %. If both come from one distribution, the largest RANKS values are all on one
side with probability 2 ** (1 - RANKS), and so are the smallest.
"""

from __future__ import annotations

import pytest
import torch
from published import PUBLISHED, Authors, our_config, under_our_names
from table import record

pytest.importorskip("detectron2")
from detectron2.modeling import build_model

SEEDS = 3
ERRORS = 5.0
RANKS = 30
LABELS = "core.query_design.content.label_embedding.weight"


def starts(build, first_seed: int) -> list[dict[str, torch.Tensor]]:
    """Parameters outside the backbone, whose start is a file, of models with different seeds."""
    found = []
    for seed in range(first_seed, first_seed + SEEDS):
        torch.manual_seed(seed)
        found.append({n: p.detach() for n, p in build().items() if n.startswith("core.")})
    return found


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far [seeds, ...] of ours are from theirs, in standard errors; inf if constants or range
    differ."""
    assert ours.shape == theirs.shape
    is_constant = (theirs == theirs[:1]).all(0).expand_as(theirs)
    if not torch.allclose(ours[is_constant], theirs[is_constant], rtol=1e-6, atol=1e-6):
        return float("inf")
    ours, theirs = ours[~is_constant].double(), theirs[~is_constant].double()
    size = theirs.numel()
    if not size:
        return 0.0
    for sign in (1, -1):
        ranked = [(sign * side).topk(min(RANKS, size)).values for side in (ours, theirs)]
        if size > RANKS and (ranked[0][0] < ranked[1][-1] or ranked[1][0] < ranked[0][-1]):
            return float("inf")
    spread = (theirs.var() + ours.var()).sqrt()
    mean = (ours.mean() - theirs.mean()).abs() / spread * size**0.5
    log_ratio = (ours.std() / theirs.std()).log().abs() * size**0.5
    return float(torch.maximum(mean, log_ratio))


def equal_matrices(state: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    """Sets of matrices with equal random values; not those of proposal heads, which are not copies
    of the decoder's here (see layers/initialization.py)."""
    found: dict[tuple, set[str]] = {}
    for name, tensor in state.items():
        if tensor.dim() > 1 and tensor.std() > 0 and "query_design.learned.head." not in name:
            found.setdefault((tensor.shape, *tensor.flatten()[:8].tolist()), set()).add(name)
    return {frozenset(names) for names in found.values() if len(names) > 1}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_start_as_the_authors(authors, monkeypatch, name):
    published = PUBLISHED[name]
    program = Authors(published, authors(published.repository), monkeypatch)
    cfg = our_config(name, published.num_classes)
    method = cfg.MODEL.DN_DETR.METHOD
    ours = starts(lambda: dict(build_model(cfg).named_parameters()), 100)
    theirs = starts(lambda: under_our_names(method, program.model().state_dict()), 0)
    if name == "mask_dino":  # theirs has no label "unknown", ours does not use it
        for side in (ours, theirs):
            for state in side:
                state[LABELS] = state[LABELS][:-1]
    deviations = {
        name: deviation(*(torch.stack([one[name] for one in side]) for side in (ours, theirs)))
        for name in ours[0]
    }
    worst = max(deviations, key=deviations.get)
    print(f"{len(deviations)} tensors, largest deviation {deviations[worst]:.1f} in {worst}")
    record(name, "starting values", deviations[worst])
    differing = {name: value for name, value in deviations.items() if not value < ERRORS}
    assert not differing
    of_theirs = {name: tensor for name, tensor in theirs[0].items() if name in ours[0]}
    assert equal_matrices(ours[0]) == equal_matrices(of_theirs)
