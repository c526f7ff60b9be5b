"""Pretrained backbones: recognise the source of a file and rename its parameters.

Supports names of Detectron2 and of this project; ResNets of torchvision, timm, Hugging Face and
Caffe2 (MSRA files of Detectron2); and for a backbone built by a library, names of that library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dn_detr.conversion.name_table import IGNORED, Rule, Table, resnet
from dn_detr.conversion.safe_load import is_same

Normalisation = tuple[str, tuple[float, ...], tuple[float, ...]]
"""Channel order, mean and standard deviation of the pixels (0 to 255) that weights expect."""

IMAGENET: Normalisation = ("RGB", (123.675, 116.280, 103.530), (58.395, 57.120, 57.375))
CAFFE: Normalisation = ("BGR", (103.530, 116.280, 123.675), (1.0, 1.0, 1.0))
CAFFE_SCALED: Normalisation = ("BGR", CAFFE[1], (57.375, 57.120, 58.395))

TORCHVISION = "a ResNet of torchvision or timm"
HUGGING_FACE = "a ResNet of Hugging Face"
CAFFE2 = "a ResNet of Caffe2"

WRAPPERS = re.compile(r"((module|model|backbone|bottom_up|resnet)\.)*")
"""What may come before the names of a library."""

CLASSIFIER = re.compile(
    rf"^{WRAPPERS.pattern}(stem\.fc|fc|classifier|heads?|linear|fc1000(_\w)?|pred_\w)(\.|$)"
)
"""Classification heads, which are dropped."""

PREFIXES = ("backbone.bottom_up.", "backbone.", "bottom_up.")
LAST_STAGE = 5
"""Of a ResNet: res5."""

CAFFE_CONVS = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
CAFFE_LEAVES = {"w": "weight", "b": "bias"}
CAFFE_NORM_LEAVES = {
    **dict.fromkeys(("s", "gamma"), "weight"),
    **dict.fromkeys(("b", "beta"), "bias"),
    **dict.fromkeys(("rm", "running_mean"), "running_mean"),
    **dict.fromkeys(("riv", "running_var"), "running_var"),
}
"""Short names in Detectron files, long names in the MSRA files of Detectron2."""


@dataclass(frozen=True)
class BackboneMatch:
    """The backbone parameters of a file.

    source: description of the source.
    found: parameters by the names of the backbone.
    missing: names of the backbone that are not in the file.
    surplus: names in the file that are not used.
    wrong: names with mismatched shapes.
    depth: see `resnet_depth`.
    normalisation: pixel normalisation in training, or one of `others`; None if unknown.
    strides_in_1x1: whether bottlenecks stride in their first convolution, None if unknown.
    is_affine: whether its batch norms have no statistics.
    """

    source: str
    found: dict[str, Tensor]
    missing: list[str]
    surplus: list[str]
    wrong: list[str]
    depth: int | None
    normalisation: Normalisation | None
    strides_in_1x1: bool | None = None
    is_affine: bool = False
    others: tuple[Normalisation, ...] = ()


def check_normalisation(
    weights: str, expected: Normalisation, given: Normalisation, *others: Normalisation
) -> None:
    """Check the configured pixel normalisation against that of the weights, or one of `others`.

    Raises:
        ValueError: if it differs from all by more than 1% of the standard deviation (papers
            round); the message contains the values to set.
    """
    for order, mean, std in (expected, *others):
        pairs = zip((*mean, *std), (*given[1], *given[2]), strict=True)
        tolerance = 0.01 * max(std)
        if given[0] == order and all(abs(a - b) <= tolerance for a, b in pairs):
            return
    (order, mean, std), (given_order, given_mean, given_std) = (
        (order, *([round(v, 3) for v in values] for values in rest))
        for order, *rest in (expected, given)
    )
    raise ValueError(
        f"{weights} were trained with another pixel normalisation: set INPUT.FORMAT {order} "
        f'MODEL.PIXEL_MEAN "{mean}" MODEL.PIXEL_STD "{std}", got {given_order}, {given_mean} and '
        f"{given_std}"
    )


def match_backbone(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, torch.Size],
    *,
    library: str = "",
    library_names: Mapping[str, str] | None = None,
    library_normalisation: Normalisation | None = None,
) -> BackboneMatch:
    """Match the parameters of a file to a backbone, by the naming scheme that fits best.

    Args:
        state: name -> tensor [...] of the file.
        wanted: name -> shape of the parameters and statistics of the backbone.
        library: the library that built the backbone, if any.
        library_names: its names -> names of the backbone, "" for parameters of the classifier.
        library_normalisation: pixel normalisation of its weights, None if unknown.
    """
    candidates: list[tuple[str, Renamer, Normalisation | None]] = [
        ("the names of Detectron2", _detectron2, None),
        (TORCHVISION, _by_table(resnet("x")), IMAGENET),
        (HUGGING_FACE, _by_table(HUGGING_FACE_RULES), IMAGENET),
        (CAFFE2, _caffe2, CAFFE),
    ]
    if library_names is not None:
        flat = _by_names(consecutive_block_names(library_names))
        candidates.insert(
            0, (f"{library}, with blocks numbered consecutively", flat, library_normalisation)
        )
        candidates.insert(0, (library, _by_names(library_names), library_normalisation))
    matches = [_match(state, wanted, *candidate) for candidate in candidates]
    match = max(matches, key=lambda match: (len(match.found) + len(match.wrong), len(match.found)))
    if match.source in (TORCHVISION, HUGGING_FACE):
        return replace(match, strides_in_1x1=False)
    if match.source == CAFFE2:
        # ResNeXts stride in 3x3 convolutions; their standard deviation is ambiguous.
        is_resnext = any(
            name.endswith("_branch2b_w") and tensor.shape[1] < tensor.shape[0]
            for name, tensor in state.items()
        )
        return replace(
            match,
            normalisation=CAFFE_SCALED if is_resnext else CAFFE,
            others=(CAFFE,) if is_resnext else (),
            strides_in_1x1=not is_resnext and not any("_gn_" in name for name in state),
            is_affine=_is_affine(state),
        )
    return match


Renamer = Callable[[Mapping[str, Tensor]], Iterator[tuple[str, str | None, Tensor]]]
"""State of a file -> (source name, our name, tensor); None if unknown, "" if not of a backbone."""


def _match(
    state, wanted, source: str, rename: Renamer, normalisation: Normalisation | None
) -> BackboneMatch:
    found, wrong, surplus, known = {}, [], [], []
    last = max((_stage_of(name) for name in wanted), default=0)
    for name, ours, tensor in rename(state):
        known.append(ours or "")
        if ours in found and not is_same(found[ours], tensor):
            surplus.append(f"{name}, another {ours}")
        elif ours in wanted and tuple(tensor.shape) == tuple(wanted[ours]):
            found[ours] = tensor
        elif ours in wanted:
            wrong.append(f"{ours} {list(tensor.shape)} instead of {list(wanted[ours])}")
        elif 0 < last < _stage_of(ours) <= LAST_STAGE:
            continue  # the backbone ends at an earlier feature
        elif ours != "" and not CLASSIFIER.match(name) and not IGNORED.search(name):
            surplus.append(name)
    lacking = [n for n in wanted if n not in found and not IGNORED.search(n)]
    missing = [n for n in lacking if not any(entry.startswith(f"{n} ") for entry in wrong)]
    depth = resnet_depth(known)
    return BackboneMatch(source, found, missing, surplus, wrong, depth, normalisation)


def resnet_depth(names: Collection[str]) -> int | None:
    """Return MODEL.RESNETS.DEPTH of the ResNet with these parameters, None for other networks."""
    blocks = {match[0] for name in names if (match := re.match(r"res\d\.\d+\.", name))}
    counts = tuple(
        sum(block.startswith(f"res{stage}.") for block in blocks) for stage in range(2, 6)
    )
    has_bottlenecks = any(name.startswith("res2.0.conv3.") for name in names)
    return RESNET_DEPTHS.get((counts, has_bottlenecks))


RESNET_DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
"""Blocks of the stages, and whether they are bottlenecks -> depth (1512.03385, table 1)."""


def _stage_of(name: str | None) -> int:
    """5 for "res5.0.conv1.weight"; 0 outside of stages."""
    match = re.match(r"res(\d)\.", name or "")
    return int(match[1]) if match else 0


def _detectron2(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str | None, Tensor]]:
    for name, tensor in state.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        yield name, name[len(prefix) :], tensor


def _by_table(rules: dict[str, Rule]) -> Renamer:
    """Rename by rules from names with prefix "x." to names with prefix "backbone."."""
    table = Table("", rules)

    def rename(state):
        for name, tensor in state.items():
            ours, _, _ = table.apply({f"x.{_bare(name)}": tensor})
            for new, part in ours.items():
                yield name, new.removeprefix("backbone."), part
            if not ours:
                yield name, None, tensor

    return rename


def _bare(name: str) -> str:
    return name[WRAPPERS.match(name).end() :]


def _by_names(names: Mapping[str, str]) -> Renamer:
    def rename(state):
        for name, tensor in state.items():
            yield name, names.get(name, names.get(_bare(name))), tensor

    return rename


def _is_affine(state: Mapping[str, Tensor]) -> bool:
    """Whether a Caffe2 file has batch norms without statistics."""
    norms = [name for name in state if "_bn_" in name]
    return bool(norms) and not any(name.endswith(("_rm", "_running_mean")) for name in norms)


def _caffe2(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str | None, Tensor]]:
    """Affine-only norms get mean 0 and variance 1. The bias of the first convolution is dropped, as
    in Detectron2, because a norm follows.
    """
    is_affine = _is_affine(state)
    for name, tensor in state.items():
        match = re.fullmatch(r"(?:(?:res_)?conv1|res(\d)_(\d+)_(branch\w+?))_([bg]n_)?(\w+)", name)
        stage, index, branch, norm, leaf = match.groups() if match else (None,) * 5
        leaf = (CAFFE_NORM_LEAVES if norm else CAFFE_LEAVES).get(leaf)
        if name == "conv1_b":
            yield name, "", tensor
        elif leaf is None or (branch or "branch1") not in CAFFE_CONVS:
            yield name, None, tensor
        else:
            conv = f"res{stage}.{index}.{CAFFE_CONVS[branch]}" if branch else "stem.conv1"
            yield name, f"{conv}.{'norm.' if norm else ''}{leaf}", tensor
            if is_affine and norm == "bn_" and leaf == "weight":
                yield name, f"{conv}.norm.running_mean", torch.zeros_like(tensor)
                yield name, f"{conv}.norm.running_var", torch.ones_like(tensor)


def consecutive_block_names(library_names: Mapping[str, str]) -> dict[str, str]:
    """Derive names of EfficientNets with consecutively numbered blocks from those of timm, which
    numbers blocks within stages and names norms differently.
    """
    found = (re.match(r"blocks\.(\d+)\.(\d+)\.", name) for name in library_names)
    blocks = sorted({(int(match[1]), int(match[2])) for match in found if match})
    names = {}
    for name, ours in library_names.items():
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(\w+)", module)
        if block is None:
            names[f"_{FLAT_OUTSIDE.get(module, module)}.{leaf}"] = ours
            continue
        stage, index = int(block[1]), int(block[2])
        expands = f"blocks.{stage}.{index}.conv_pwl.weight" in library_names
        part = (FLAT_EXPANDING if expands else FLAT_DEPTHWISE).get(block[3], block[3])
        names[f"_blocks.{blocks.index((stage, index))}._{part}.{leaf}"] = ours
    return names


FLAT_OUTSIDE = {"bn1": "bn0", "bn2": "bn1", "classifier": "fc"}
FLAT_DEPTHWISE = {"conv_dw": "depthwise_conv", "conv_pw": "project_conv"}
FLAT_EXPANDING = {
    "conv_pw": "expand_conv",
    "bn1": "bn0",
    "conv_dw": "depthwise_conv",
    "bn2": "bn1",
    "conv_pwl": "project_conv",
    "bn3": "bn2",
}


def _hugging_face() -> dict[str, Rule]:
    def conv(theirs: str, ours: str) -> dict[str, Rule]:
        return {f"{theirs}.convolution": ours, f"{theirs}.normalization": f"{ours}.norm"}

    rules = conv("x.embedder.embedder", "backbone.stem.conv1")
    for stage in range(4):
        theirs, ours = f"x.encoder.stages.{stage}.layers.{{}}", f"backbone.res{stage + 2}.{{}}"
        rules |= conv(f"{theirs}.shortcut", f"{ours}.shortcut")
        for layer in range(3):
            rules |= conv(f"{theirs}.layer.{layer}", f"{ours}.conv{layer + 1}")
    return rules


HUGGING_FACE_RULES = _hugging_face()
