"""Detectron2's checkpointer that rejects weights which do not fit the model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import BottleneckBlock, DeformBottleneckBlock
from torch import Tensor, nn

from dn_detr.conversion.backbone_weights import (
    IMAGENET,
    BackboneMatch,
    Normalisation,
    check_normalisation,
    match_backbone,
    resnet_depth,
)
from dn_detr.conversion.convert_weights import ABSENT, COCO_CATEGORIES, convert, keep_coco_classes
from dn_detr.conversion.published_weights import catalogue, check_hash
from dn_detr.conversion.safe_load import (
    as_parameters,
    read_arrays,
    read_pickle,
    read_safetensors,
)
from dn_detr.d2.data.catalog import class_names
from dn_detr.d2.engine.collective import run_on_main_rank
from dn_detr.d2.engine.ema import KEY as EMA
from dn_detr.d2.engine.run_folder import checkpoints_in, newest_checkpoint
from dn_detr.d2.modeling.timm_torchvision import NamedBackbone
from dn_detr.errors import InputError
from dn_detr.models.published import set_as_published

CLASS_DEPENDENT = ("class_head", "class_heads", "label_embedding", "cls_score", "bbox_pred")
"""Parameters with one entry per class; all are reinitialized when the classes change."""

TRAINING_ONLY = ("auxiliary", "label_embedding", "box_embedding")
"""Parameters that only auxiliary queries use: optional in a checkpoint."""

AVERAGED = f"@{EMA}"
"""Suffix of a path that selects the moving average of the weights in a checkpoint."""

DETECTOR = "detector"
"""Key of the detector's description in a checkpoint, see `describe`."""

FORMAT = 2
"""Version of the parameter names; increase it when one changes (tests/d2/parameters.txt)."""

QUERY_ROWS = re.compile(r"\.learned\.(\d+\.)?(position|content|box_logits|anchors)$")
"""Parameters with one row per query: of the matched queries, of further groups and one-to-many."""

FOREIGN = ("transformer", "class_embed", "sem_seg_head", "input_proj", "query_embed", "bbox_embed")
"""Parts of parameter names in original implementations, detrex and Hugging Face."""


def resolve_weights(name_or_path: str) -> str:
    """Return the path of weights that the user named: a path, an address or a published name.

    The main rank fetches and converts what is published under the name
    (`conversion.published_weights`); a file of this name comes first.
    """
    from dn_detr.d2.inference.convert_file import fetch_converted  # which imports this module

    name = name_or_path.removesuffix(AVERAGED)
    if name not in catalogue() or os.path.isfile(name):
        return name_or_path
    return run_on_main_rank(lambda: str(fetch_converted(name)))


def read_checkpoint(filename: str) -> dict:
    """Read a checkpoint of any supported format without running code from it.

    Returns:
        {"model": name -> array or tensor, ...}.

    Raises:
        InputError: If the file is damaged or not a checkpoint.
    """
    readers = {".safetensors": read_safetensors, ".pkl": read_arrays}
    try:
        content = readers.get(os.path.splitext(filename)[1], read_pickle)(filename)
    except (ValueError, KeyError) as error:
        raise InputError(f"{filename!r} cannot be loaded as a checkpoint: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{filename!r} is not a checkpoint: it must hold arrays by name.")
    name = next((name for name in ("model", "state_dict", "blobs") if name in content), None)
    state = content if name is None else content[name]
    if isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if isinstance(state, dict):
        state = {
            k: v for k, v in state.items() if not isinstance(k, str) or not k.endswith("_momentum")
        }
    others = {} if name is None else content
    return {**others, "model": state, "matching_heuristics": False}


def describe(cfg: CfgNode) -> dict:
    """Describe the model for its checkpoints, in types that `torch.load(weights_only=True)` reads.

    Returns:
        "format", "config" as YAML, "class_names" and "as_published" (`models.published`).
    """
    names = [str(name) for name in class_names(cfg.DATASETS.TRAIN[0])]
    return {
        "format": FORMAT,
        "config": cfg.dump(),
        "class_names": names,
        "as_published": cfg.MODEL.DN_DETR.AS_PUBLISHED,
    }


def check_format(filename: str, checkpoint: dict) -> None:
    """Raise an InputError if the checkpoint has the parameter names of another version."""
    about = checkpoint.get(DETECTOR) or {}
    found = about.get("format", 1 if "config" in about else FORMAT)
    if found != FORMAT:
        raise InputError(
            f"{filename!r} was saved with the parameter names of format {found}, and this version "
            f"of dn_detr reads format {FORMAT}: use the version that saved it."
        )


def has_part(key: str, parts: tuple[str, ...]) -> bool:
    """Return whether a component of the dotted name is in `parts`."""
    return any(part in key.split(".") for part in parts)


def is_counter(key: str) -> bool:
    """Return whether the name is a counter of batch norm, which PyTorch fills in if missing."""
    return key.endswith("num_batches_tracked")


def fit_query_rows(state: dict[str, Tensor], known: Mapping[str, Tensor]) -> list[str]:
    """Give the learned queries of `state`, in place, as many rows as those of a model have.

    The first rows are kept, or all are repeated in turn. Rows of one query, e.g. its content and
    its box, stay together, and in two-stage methods content stays with the rank of its proposal:
    the first rows are those of the best. Equal queries part in a training as soon as one of them is
    matched to an object.

    Args:
        state: Name -> parameter of a checkpoint [...].
        known: Name -> parameter of the model [...].

    Returns:
        A sentence part for each number that changes.

    Raises:
        InputError: If the number of patterns changes, which all queries share: each has learned
            another kind of object, so that none can be left out or stand for another.
    """
    changes = {}
    for name in state.keys() & known.keys():
        old, new = state[name], known[name]
        if old.shape[1:] != new.shape[1:] or not old.shape or old.shape[0] in (0, new.shape[0]):
            continue
        if name.endswith("shared.patterns"):
            raise InputError(
                f"the checkpoint has {old.shape[0]} patterns, which are not copied or cut like "
                f"queries: set MODEL.DN_DETR.NUM_PATTERNS to {old.shape[0]}, got {new.shape[0]}."
            )
        if QUERY_ROWS.search(name):
            state[name] = old[torch.arange(new.shape[0]) % old.shape[0]]
            how = "repeated in turn" if new.shape[0] > old.shape[0] else "of which the first stay"
            changes[f"{old.shape[0]} learned queries became {new.shape[0]}, {how}"] = True
    return sorted(changes)


class Checkpointer(DetectionCheckpointer):
    """Load a detector of the same architecture, or initialize a training from other weights.

    A training can start from a detector with other classes (another number or other names), whose
    class heads and label embedding are reinitialized, from one with another number of queries
    (`fit_query_rows`), or from a backbone of any library (`conversion.backbone_weights`). Other
    missing or unexpected parameters are an InputError, as they would only show as a low AP.
    TRAINING_ONLY parameters are optional.

    Args:
        model: Model to load.
        save_dir: Folder of the checkpoints to resume from.
        is_for_training: Whether weights may initialize a training.
        detector: Description of this model, see `describe`.
        may_be_new: MODEL.DN_DETR.NEW_PARAMETERS.
        **checkpointables: Other objects to load on resuming.
    """

    def __init__(
        self,
        model,
        save_dir: str = "",
        *,
        is_for_training: bool = False,
        detector: dict | None = None,
        may_be_new: Sequence[str] = (),
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.is_for_training = is_for_training
        self.detector = detector
        self.may_be_new = tuple(may_be_new)

    def has_checkpoint(self) -> bool:
        return bool(checkpoints_in(self.save_dir))

    def get_checkpoint_file(self) -> str:
        return run_on_main_rank(lambda: newest_checkpoint(self.save_dir))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """Load a checkpoint.

        Args:
            path: File, address or name of published weights; the suffix "@ema" selects the moving
                average of the weights.
            checkpointables: What to restore besides the model; None restores all (a resume).
        """
        self.path = path = resolve_weights(path)
        path = path.removesuffix(AVERAGED)
        self.may_initialize = self.is_for_training and checkpointables is not None
        if path and "://" not in path and not os.path.isfile(path):
            raise InputError(f"there is no checkpoint {path!r}: correct MODEL.WEIGHTS.")
        try:
            return super().load(path, checkpointables)
        except OSError as error:
            raise InputError(
                f"the checkpoint {path!r} cannot be fetched ({error}): copy the file to this "
                "machine and set MODEL.WEIGHTS to its path, or to '' to start from random weights."
            ) from error

    def _load_file(self, filename: str) -> dict:
        """Read {"model": name -> array, ...} without running code from the file."""
        if "://" in self.path:
            check_hash(self.path.removesuffix(AVERAGED), filename)
        checkpoint = read_checkpoint(filename)
        if self.path.endswith(AVERAGED):
            average = checkpoint.pop(EMA, None)
            if not isinstance(average, dict) or "model" not in average:
                raise InputError(
                    f"{filename!r} holds no moving average of the weights that a training with "
                    f"SOLVER.EMA.ENABLED saved: leave {AVERAGED!r} out of MODEL.WEIGHTS."
                )
            checkpoint["model"] = average["model"]
        if not isinstance(checkpoint.get(DETECTOR), dict):  # another project's
            checkpoint.pop(DETECTOR, None)
        check_format(filename, checkpoint)
        state = checkpoint["model"]
        if not isinstance(state, dict) or not all(hasattr(v, "shape") for v in state.values()):
            raise InputError(f"{filename!r} is not a checkpoint: it must hold arrays by name.")
        try:
            checkpoint["model"] = as_parameters(state)
        except ValueError as error:
            raise InputError(f"{filename!r} cannot be loaded as a checkpoint: {error}.") from error
        return checkpoint

    def _load_model(self, checkpoint: dict):
        state, known = checkpoint["model"], self.model.state_dict()
        as_published = (checkpoint.get(DETECTOR) or {}).get("as_published") is True
        if not any(has_part(key, ("core", "roi_heads")) for key in state):
            converted = self._converted(state)
            if converted is None and self.may_initialize:
                return self._load_backbone(checkpoint)
            if converted is None and self._is_backbone_alone(state):
                raise InputError(
                    f"{self.path!r} holds a backbone alone and no detector: it can start a "
                    f"training, but not be evaluated or resumed."
                )
            state = checkpoint["model"] = state if converted is None else converted
            as_published = converted is not None
        if as_published and not self.may_initialize:
            set_as_published(self.model)
        has_other_classes = self.may_initialize and self._has_other_classes(checkpoint)
        reinitialized = CLASS_DEPENDENT if has_other_classes else ()
        for key in [key for key in state if has_part(key, reinitialized)]:
            del state[key]
        resized = fit_query_rows(state, known) if self.may_initialize else []
        self._check_floats(state, known)
        # Before loading: frozen batch norms then fill in missing statistics.
        missing = [key for key in known if key not in state and not is_counter(key)]
        incompatible = super()._load_model(checkpoint)
        shapes = [f"{k} {old} instead of {new}" for k, old, new in incompatible.incorrect_shapes]
        total = sum(not is_counter(key) for key in known)
        summary = f"Loaded {total - len(missing) - len(shapes)} of {total} parameters"
        lacking = [k for k in missing if not has_part(k, (*reinitialized, *TRAINING_ONLY))]
        surplus = [k for k in incompatible.unexpected_keys if not has_part(k, TRAINING_ONLY)]
        for kind, keys in (("differs in", shapes), ("lacks", lacking), ("has also", surplus)):
            if keys:
                raise InputError(
                    f"{self.path!r} is a checkpoint of another model: it {kind} {len(keys)} of "
                    f"{total} parameters, e.g. {keys[0]}."
                )
        if missing:
            cause = "other classes" if reinitialized else "not in the checkpoint"
            summary += f"; newly initialized ({cause}): {', '.join(missing)}"
        summary = "; ".join([summary, *resized])
        self.logger.info(summary)
        return incompatible

    def _log_incompatible_keys(self, incompatible) -> None:
        """Log nothing, e.g. no warning for each parameter beside a backbone: `_load_model` refuses
        or logs all that differs.
        """

    def _is_backbone_alone(self, state: dict) -> bool:
        """Whether a file has parameters of this backbone, by whatever names, and of nothing
        else.
        """
        others = [k for k in self.model.state_dict() if not k.startswith("backbone.")]
        if not hasattr(self.model, "backbone") or any(key in state for key in others):
            return False
        match, _, _ = self._match_backbone(state)
        return bool(match.found or match.wrong)

    def _match_backbone(self, state: dict) -> tuple[BackboneMatch, nn.Module, str]:
        """What a file holds of the backbone, the network without pyramid, and its prefix."""
        backbone = self.model.backbone
        prefix = "backbone.bottom_up." if hasattr(backbone, "bottom_up") else "backbone."
        body = getattr(backbone, "bottom_up", backbone)
        expected = {name: value.shape for name, value in body.state_dict().items()}
        library = {}
        if isinstance(body, NamedBackbone):
            state = body.stages.library_state(state)
            names, normalisation = body.library_names(), body.normalisation
            library = {
                "library": body.name,
                "library_names": names,
                "library_normalisation": normalisation,
            }
        return match_backbone(state, expected, **library), body, prefix

    def _load_backbone(self, checkpoint: dict):
        """Load all parameters of the backbone, under the names of any library."""
        match, body, prefix = self._match_backbone(checkpoint["model"])
        expected = body.state_dict()
        if not match.found and not match.wrong:
            raise InputError(
                f"{self.path!r} holds none of the parameters of this model's backbone under any "
                f"known name: the backbone has e.g. {next(iter(expected))}, the file "
                f"{next(iter(checkpoint['model']), 'nothing')}.{self._hint(match, body)}"
            )
        may_be_new = (*self.may_be_new, "pyramid.")
        missing = [name for name in match.missing if not name.startswith(may_be_new)]
        for fault, names in (
            ("these shapes differ", match.wrong),
            ("the file lacks parameters of the backbone", missing),
            ("the file has parameters that the backbone does not have", match.surplus),
        ):
            if names:
                hint = self._hint(match, body)
                if names is missing:
                    hint = hint or " (MODEL.DN_DETR.NEW_PARAMETERS names what the file may lack.)"
                raise InputError(
                    f"{self.path!r}, read as {match.source}, does not fit the backbone of "
                    f"{len(expected)} parameters and statistics: {fault}, {len(names)} in all, "
                    f"e.g. {names[0]}.{hint}",
                    longest=1000,
                )
        self._check_floats(match.found, expected)
        broken = [name for name, v in match.found.items() if not v.float().isfinite().all()]
        if broken:
            raise InputError(f"{self.path!r} has NaN or infinity in {broken[0]}.")
        normalisation, strides = match.normalisation, match.strides_in_1x1
        if checkpoint.get("__author__") == "torchvision":
            normalisation, strides = IMAGENET, False
        self._refuse(
            *self._normalisation_faults(normalisation, *match.others),
            *self._network_faults(body, strides, is_affine=match.is_affine),
        )
        state = {f"{prefix}{name}": tensor for name, tensor in match.found.items()}
        incompatible = super()._load_model({"model": state})
        new = f"; newly initialized: {', '.join(match.missing)}" if match.missing else ""
        self.logger.info(
            f"Loaded {len(match.found)} of {len(expected)} parameters and statistics of the "
            f"backbone from {self.path}, read as {match.source}{new}"
        )
        return incompatible

    def _check_floats(self, state: dict, known: dict) -> None:
        """InputError where the file has integers for what are floating-point numbers here."""
        for name, value in state.items():
            is_float = name in known and known[name].is_floating_point()
            if is_float and not value.is_floating_point():
                raise InputError(
                    f"{self.path!r} has values of type {value.dtype} for {name}, which must be "
                    "floating-point numbers."
                )

    def _hint(self, match: BackboneMatch, body) -> str:
        """Say how to build the network of the file; "" where that is not known."""
        depth = resnet_depth(body.state_dict().keys())
        if depth and match.depth and match.depth != depth:
            return (
                f" (The file is of a ResNet-{match.depth}: set MODEL.RESNETS.DEPTH {match.depth}.)"
            )
        is_of_detectron2 = body is self.model.backbone and not isinstance(body, NamedBackbone)
        if is_of_detectron2 and (match.surplus or not (match.found or match.wrong)):
            return (
                " (For a network of torchvision or timm, set MODEL.BACKBONE.NAME "
                "build_named_backbone "
                "and MODEL.DN_DETR.BACKBONE to its name, e.g. timm/resnet50d.)"
            )
        return ""

    def _refuse(self, *faults: str) -> None:
        """InputError of all faults, if any."""
        if faults:
            raise InputError(f"{'; and '.join(faults)}.", longest=1000)

    def _network_faults(
        self, body, strides_in_1x1: bool | None, *, is_affine: bool
    ) -> Iterator[str]:
        """Where a backbone has the parameters, but computes something else with them."""
        modules = list(body.modules())
        if is_affine and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
            yield (
                f"the batch norms in {self.path!r} are without statistics, so they can only "
                f"stay as they are: set MODEL.RESNETS.NORM FrozenBN"
            )
        blocks = (BottleneckBlock, DeformBottleneckBlock)
        strided = next((m for m in modules if isinstance(m, blocks) and m.stride == 2), None)
        if strides_in_1x1 is None or strided is None:
            return
        if (strided.conv1.stride == (2, 2)) != strides_in_1x1:
            yield (
                f"the network of the weights in {self.path!r} strides in other convolutions: set "
                f"MODEL.RESNETS.STRIDE_IN_1X1 {strides_in_1x1}"
            )

    def _converted(self, state: dict) -> dict | None:
        """Rename parameters of an original, detrex or Hugging Face detector; None if not one."""
        method = getattr(self.model, "method", None)
        try:
            ours, table = convert(state, method)
        except ValueError as error:
            if not any(has_part(key, FOREIGN) for key in state):
                return None
            raise InputError(
                f"{self.path!r} is a detector of another project, which cannot be read as "
                f"{method or type(self.model).__name__}: {error}."
            ) from error
        self.logger.info(f"Read {self.path} as {table.source}")
        self._refuse(*self._normalisation_faults(IMAGENET))
        known = self.model.state_dict()
        surplus = {
            value.shape[0] - known[name].shape[0]
            for name, value in ours.items()
            if has_part(name, CLASS_DEPENDENT) and name in known and value.shape[0] > 1
        }
        is_coco = self.model.num_classes == len(COCO_CATEGORIES)
        if is_coco and surplus == {len(ABSENT) + 1 + table.empty_classes}:
            return keep_coco_classes(ours, table.empty_classes)
        return ours

    def _normalisation_faults(
        self, normalisation: Normalisation | None, *others: Normalisation
    ) -> Iterator[str]:
        if normalisation is None:
            return
        mean, std = (v.flatten().tolist() for v in (self.model.pixel_mean, self.model.pixel_std))
        try:
            given = (self.model.input_format, mean, std)
            check_normalisation(f"the weights in {self.path!r}", normalisation, given, *others)
        except ValueError as error:
            yield str(error)

    def _has_other_classes(self, checkpoint: dict) -> bool:
        """Compare class names if both sides have them, else the sizes of CLASS_DEPENDENT."""
        saved, ours = (
            (about or {}).get("class_names") for about in (checkpoint.get(DETECTOR), self.detector)
        )
        if saved and ours and saved != ours:
            return True
        state, known = checkpoint["model"], self.model.state_dict()
        return any(
            tuple(state[key].shape) != tuple(known[key].shape)
            for key in known.keys() & state.keys()
            if has_part(key, CLASS_DEPENDENT)
        )
