"""A table of names: theirs on the left, ours on the right.

A name on the left is that of a parameter or of a module (then its weight, bias and running
statistics follow); "{}" stands for a number and is carried over to the right. On the right stands

 - a name: the parameter or module is called that here;
 - several names: the parameter is cut into equal parts along its first axis;
 - a list of names: the parameter or module stands here under each of them;
 - None: we have no such parameter, for a reason that the table states;
 - a function from the tensor to {our name: tensor}, in whose names "{}" is the number too.

Names of ours are those of the core ("encoder.layers.0.norm"), or start with "backbone.".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Rule = str | tuple[str, ...] | list[str] | None | Callable[[Tensor], dict[str, Tensor]]

IGNORED = re.compile(r"(^|\.)num_batches_tracked$")
"""Counters of batch norm, which a frozen one does not need."""


@dataclass(frozen=True)
class Table:
    """source: whose files it is for; rules: see above; optional: names on the left that a file may
    lack (variants of one architecture)."""

    source: str
    rules: dict[str, Rule]
    optional: frozenset[str] = frozenset()

    def apply(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """-> (our parameters, names without a rule, rules of this table that found no name)."""
        patterns = [
            (re.compile(re.escape(name).replace(r"\{\}", r"(\d+)")), name) for name in self.rules
        ]
        ours, unknown, used = {}, [], set()
        for name, tensor in state.items():
            if IGNORED.search(name):
                continue
            found = _look_up(name, patterns)
            if found is None:
                unknown.append(name)
                continue
            rule_name, numbers, leaf = found
            used.add(rule_name)
            ours.update(_rename(self.rules[rule_name], numbers, leaf, tensor))
        unused = [name for name in self.rules if name not in used and name not in self.optional]
        ours = {n if n.startswith("backbone.") else f"core.{n}": t for n, t in ours.items()}
        return ours, unknown, unused


def _look_up(
    name: str, patterns: list[tuple[re.Pattern, str]]
) -> tuple[str, tuple[str, ...], str] | None:
    """The rule for `name`, the numbers in it and what follows the name of the module."""
    module, _, leaf = name.rpartition(".")
    for candidate, rest in ((name, ""), (module, f".{leaf}")):
        for pattern, rule_name in patterns:
            match = pattern.fullmatch(candidate)
            if match:
                return rule_name, match.groups(), rest
    return None


def _rename(rule: Rule, numbers: tuple[str, ...], leaf: str, tensor: Tensor) -> dict[str, Tensor]:
    if rule is None:
        return {}
    if callable(rule):
        return {name.format(*numbers): part for name, part in rule(tensor).items()}
    if isinstance(rule, str):
        rule = [rule]
    if isinstance(rule, list):
        return {name.format(*numbers) + leaf: tensor for name in rule}
    parts = tensor.chunk(len(rule), dim=0)
    return {n.format(*numbers) + leaf: part for n, part in zip(rule, parts, strict=True)}


def attention(theirs: str, ours: str) -> dict[str, Rule]:
    """An `nn.MultiheadAttention`, whose q, k and v lie below each other."""
    return {
        f"{theirs}.in_proj_weight": tuple(f"{ours}.{part}.weight" for part in "qkv"),
        f"{theirs}.in_proj_bias": tuple(f"{ours}.{part}.bias" for part in "qkv"),
        f"{theirs}.out_proj": f"{ours}.out",
    }


def below(prefix: str, ours: str, names: dict[str, str]) -> dict[str, Rule]:
    """Modules that lie below `prefix` there and below `ours` here."""
    return {f"{prefix}.{theirs}": f"{ours}.{name}" for theirs, name in names.items()}


def resnet(prefix: str) -> dict[str, Rule]:
    """torchvision's names of a ResNet below `prefix`, to Detectron2's."""
    rules: dict[str, Rule] = {
        f"{prefix}.conv1": "backbone.stem.conv1",
        f"{prefix}.bn1": "backbone.stem.conv1.norm",
    }
    for stage in range(1, 5):
        theirs, ours = f"{prefix}.layer{stage}.{{}}", f"backbone.res{stage + 1}.{{}}"
        rules[f"{theirs}.conv{{}}"] = f"{ours}.conv{{}}"
        rules[f"{theirs}.bn{{}}"] = f"{ours}.conv{{}}.norm"
        rules[f"{theirs}.downsample.0"] = f"{ours}.shortcut"
        rules[f"{theirs}.downsample.1"] = f"{ours}.shortcut.norm"
    return rules
