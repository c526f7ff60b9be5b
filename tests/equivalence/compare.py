"""Our side of a comparison: weights by the converter, predictions, losses, gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torchvision
from peers import difference, layers_of
from table import record
from torch import nn

from dn_detr.build import LossConfig
from dn_detr.conversion.convert_weights import convert
from dn_detr.conversion.name_table import Table, resnet
from dn_detr.losses.matcher import Costs, assign

LARGEST = 1e-7
"""Largest relative difference of predictions, losses and gradients, all in float64."""


def converted(method, state, backbone="backbone.0.body"):
    """The parameters of their model `state` under our names, by the converter.

    backbone: the name of theirs, which the converter expects and is made up here in place of the
    one of the compared model; None: it is Detectron2's.
    """
    with torch.device("meta"):
        parameters = torchvision.models.resnet50(weights=None).state_dict()
    names = {f"{backbone}.{n}": t for n, t in parameters.items() if not n.startswith("fc.")}
    if backbone is None:
        names, *_ = Table("torchvision", resnet("None")).apply(names)
    own = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")}
    found, _ = convert({**own, **names}, method)
    return {name: tensor for name, tensor in found.items() if name.startswith("core.")}


@dataclass
class Pair:
    """Our model and theirs, to which `load` gives the same weights.

    Attributes:
        row: of the table: the name of our configuration.
        method: a key of the converter's tables.
        names: keyword arguments of `converted`.
        split: their state -> their state for the converter, and parameters of ours that it lacks.
    """

    row: str
    method: str
    ours: nn.Module
    theirs: nn.Module
    names: dict = field(default_factory=dict)
    split: Callable = lambda state: (state, {})

    def to_ours(self, state) -> dict:
        """The parameters of ours from the state of theirs."""
        state, others = self.split(state)
        core = converted(self.method, state, **self.names)
        return {name.removeprefix("core."): tensor for name, tensor in core.items()} | others

    def load(self) -> None:
        """Carry the weights of theirs to ours; all of them, and nothing more."""
        self.ours.load_state_dict(self.to_ours(self.theirs.state_dict()))


def compare_gradients(ours, theirs, to_ours) -> dict[str, float]:
    """Difference of the gradients that two models hold, for every parameter of theirs.

    to_ours: their state -> ours. The chain rule through it gives our gradients with respect to
    their parameters, whatever it does: rename, split, stack, pad, copy. What it leaves at zero in
    ours has no gradient. Relative to the largest value of a parameter's gradient, or to 1e-6 of the
    largest of all (where it is zero but for rounding).
    """
    leaves = {id(p): p.detach().clone().requires_grad_() for p in theirs.parameters()}
    state = theirs.state_dict(keep_vars=True)
    mapped = to_ours({name: leaves.get(id(p), p) for name, p in state.items()})
    reached = to_ours({name: torch.ones_like(tensor) for name, tensor in state.items()})
    total = torch.zeros(())
    for name, parameter in ours.named_parameters():  # parameters that are shared come once
        if parameter.grad is not None:
            total = total + (mapped[name] * parameter.grad).sum()
            assert not parameter.grad[reached[name] == 0].any(), f"{name} has a gradient of its own"
    total.backward()
    found = {}
    for name, parameter in theirs.named_parameters():
        zero = torch.zeros_like(parameter)
        own, other = leaves[id(parameter)].grad, parameter.grad
        found[name] = (zero if own is None else own, zero if other is None else other)
    largest = max(float(other.abs().max()) for _, other in found.values())
    return {
        name: float((own - other).abs().max() / other.abs().max().clamp(min=1e-6 * largest))
        for name, (own, other) in found.items()
    }


def compare(pair: Pair, output, features, padding, targets=None):
    """Predictions of ours, after comparing those of all layers with `output` of theirs."""
    pair.load()
    predictions = pair.ours.train(targets is not None)(features, padding, targets)
    matched = predictions.of("match")
    check(pair.row, "outputs", {
        "logits": difference(matched.logits, layers_of(output, "pred_logits")),
        "boxes": difference(matched.boxes, layers_of(output, "pred_boxes")),
    })  # fmt: skip
    return predictions


def check(row: str, column: str, found: dict[str, float], bound: float = LARGEST) -> None:
    """Print and record the largest difference; it must be below `bound`."""
    name = max(found, key=found.get)
    print(f"{row}, {column}: {len(found)} compared, largest difference {found[name]:.1e} in {name}")
    record(row, column, found[name])
    assert found[name] < bound, (name, found[name])


def losses_of(predictions, targets, *, costs=None, masks=None, **criterion):
    """Our losses.

    criterion: keyword arguments of `LossConfig`, where the boxes weigh 1 like the others.
    """
    assignments = assign(predictions, targets, costs or Costs())
    config = LossConfig(**{"l1_weight": 1.0, "giou_weight": 1.0, **criterion})
    terms = config.criterion(masks)
    return terms(predictions, targets, assignments, max(1, sum(targets.counts)))


def under_their_names(ours: dict, theirs: dict, patterns: dict) -> dict:
    """Our losses under their names, those of the same name added up.

    patterns: our segment -> their key, with {} for loss_ce and the like; the number of the layer
    follows on this or on the whole.
    """
    together = {}
    for name, value in ours.items():
        _, term, *parts = name.split("_")
        layer = f"_{parts.pop()}" if parts and parts[-1].isdigit() else ""
        pattern = patterns["_".join(parts) or "match"]
        keys = pattern.format(f"loss_{term}") + layer, pattern.format(f"loss_{term}{layer}")
        key = next(key for key in keys if key in theirs)
        together[key] = together[key] + value if key in together else value
    return together


def compare_losses(pair: Pair, ours: dict, theirs: dict, patterns: dict) -> None:
    """Compare all losses, and the gradients of their sum.

    Losses below 1e-3 are compared by their difference: without noise, the boxes of denoising
    queries before the first layer are the ground truth, what is left of their losses is rounding.
    """
    ours = under_their_names(ours, theirs, patterns)
    check(pair.row, "losses", {
        key: float((value - theirs[key]).abs() / theirs[key].abs().clamp(min=1e-3))
        for key, value in ours.items()
    })  # fmt: skip
    sum(ours.values()).backward()
    sum(theirs[key] for key in ours).backward()
    check(pair.row, "gradients", compare_gradients(pair.ours, pair.theirs, pair.to_ours))
