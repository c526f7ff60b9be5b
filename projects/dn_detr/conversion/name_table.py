"""Tables of rules that map source parameter names to names of this project.

The key of a rule names a parameter, or a module (with weight, bias and running statistics); "{}"
matches a number, which is inserted into our name. The value is

 - a name: rename the parameter or module;
 - a tuple of names: split the parameter into equal parts along its first axis;
 - a list of names: copy the parameter or module to each of them;
 - None: drop the parameter, for the reason given in the table;
 - a function from the tensor to {our name: tensor}, whose names may contain "{}".

Our names are those of the core ("encoder.layers.0.norm") or start with "backbone.".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Rule = str | tuple[str, ...] | list[str] | None | Callable[[Tensor], dict[str, Tensor]]

IGNORED = re.compile(r"(^|\.)num_batches_tracked$")
"""Batch norm counters, which frozen batch norm does not use."""


@dataclass(frozen=True)
class Table:
    """Renaming rules for checkpoints of one source.

    Args:
        source: project that published the files.
        rules: see the module docstring.
        optional: keys of rules that a file may lack (variants of one architecture).
        empty_classes: rows at the end of its class heads that no object has.
    """

    source: str
    rules: dict[str, Rule]
    optional: frozenset[str] = frozenset()
    empty_classes: int = 0

    def apply(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
        """Rename the parameters [...] of a checkpoint.

        Returns:
            Our parameters, source names without a rule, and keys of unused rules.
        """
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
    """Find the rule for `name`, the numbers in it and the leaf after the module name."""
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
    if tensor.shape[0] % len(rule):
        raise ValueError(
            f"a parameter of shape {list(tensor.shape)} cannot be split into {len(rule)} equal "
            f"parts ({', '.join(rule)}): the checkpoint is of another model"
        )
    parts = tensor.chunk(len(rule), dim=0)
    return {n.format(*numbers) + leaf: part for n, part in zip(rule, parts, strict=True)}


def attention(theirs: str, ours: str) -> dict[str, Rule]:
    """Rules for `nn.MultiheadAttention`, whose q, k and v projections are stacked."""
    return {
        f"{theirs}.in_proj_weight": tuple(f"{ours}.{part}.weight" for part in "qkv"),
        f"{theirs}.in_proj_bias": tuple(f"{ours}.{part}.bias" for part in "qkv"),
        f"{theirs}.out_proj": f"{ours}.out",
    }


def below(prefix: str, ours: str, names: dict[str, str]) -> dict[str, Rule]:
    """Rules for modules with prefix `prefix` in the source and `ours` here."""
    return {f"{prefix}.{theirs}": f"{ours}.{name}" for theirs, name in names.items()}


def resnet(prefix: str) -> dict[str, Rule]:
    """Rules for a ResNet of torchvision with prefix `prefix`, to names of Detectron2."""
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
