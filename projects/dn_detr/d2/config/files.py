"""Configuration files: found by path or by name, read with their bases."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import dn_detr
from dn_detr.errors import InputError
from dn_detr.safe_yaml import read_yaml


def configs_folder() -> Path:
    """Return the folder of this project's configurations: in the wheel, or the repository's."""
    package = Path(dn_detr.__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parents[1] / "configs"


def config_names() -> list[str]:
    """Return the names of this project's configurations, e.g. "dino" and "quick/dino"."""
    folder = configs_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if name.rpartition("/")[2][0].islower())


def find_config(name: str) -> str:
    """Return the path of a configuration.

    Args:
        name: Path of a file, or one of `config_names`, also as "configs/dino.yaml".

    Raises:
        InputError: If there is none.
    """
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return path
    inside = name.removeprefix("configs/").removesuffix(".yaml")
    known = configs_folder() / f"{inside}.yaml"
    if not inside.startswith(("/", ".")) and known.is_file():
        return str(known)
    similar = difflib.get_close_matches(inside, config_names(), n=3)
    hint = f"did you mean {' or '.join(similar)}?" if similar else "name one of configs/ or a file."
    raise InputError(f"there is no configuration {name!r}: {hint}")


def read_files(name: str, seen: tuple[str, ...] = ()) -> dict:
    """Read a configuration file on top of its bases; nothing in it is executed.

    Args:
        name: As in `find_config`; a _BASE_ is relative to the file that names it, else such a name.
        seen: The files that have this one as a base.

    Raises:
        ValueError: For a file that is no mapping, that would execute code (YAML tags of Python
            objects), or that has an address or itself as a base.
    """
    path = find_config(name)
    if path in seen:
        raise ValueError(f"{path} is its own _BASE_")
    with open(path, encoding="utf-8") as file:
        content = read_yaml(file.read())
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping of keys, got {type(content).__name__}")
    bases, merged = content.pop("_BASE_", []), {}
    for base in [bases] if isinstance(bases, str) else bases:
        if "://" in base:
            raise ValueError(
                f"the _BASE_ {base} is an address: download the file, and name its path"
            )
        beside = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        _merge(read_files(beside if os.path.isfile(beside) else base, (*seen, path)), merged)
    _find_data(content.get("DATASETS"), os.path.dirname(path))
    _merge(content, merged)
    return merged


def _merge(new: dict, into: dict) -> None:
    """Merge nested mappings in place; values of `new` win."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(value, into[key])
        else:
            into[key] = value


def with_floats(new: dict, known: dict) -> dict:
    """Return settings with floats for the integers of keys that are floats, as yacs demands."""
    return {
        key: with_floats(value, known[key])
        if isinstance(value, dict) and isinstance(known.get(key), dict)
        else float(value)
        if type(value) is int and isinstance(known.get(key), float)
        else value
        for key, value in new.items()
    }


def _find_data(node: object, folder: str) -> None:
    """Make relative paths of datasets, in place, those beside the file if only these exist."""

    def found(path: object) -> object:
        beside = os.path.join(folder, path) if isinstance(path, str) and path else ""
        is_beside = beside and not os.path.exists(path) and os.path.exists(beside)
        return beside if is_beside else path

    if not isinstance(node, dict):
        return
    if "FOLDER" in node:
        node["FOLDER"] = found(node["FOLDER"])
    entries = node.get("COCO_FORMAT")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, list):
            entry[1:] = map(found, entry[1:])


def checked_pairs(opts: list, cfg: dict) -> list:
    """Return KEY, VALUE, ... with floats where keys are floats.

    Raises:
        InputError: For the first key that the configuration does not have.
    """
    known, checked = _flat(cfg), list(map(str, opts))
    for i, key in enumerate(checked[::2]):
        if key not in known:
            similar = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {similar[0]}?" if similar else "see defaults.py for all keys."
            raise InputError(
                f"the KEY VALUE pairs of the command line cannot be used: Non-existent key {key}: "
                f"{hint}"
            )
        value = next(iter(checked[2 * i + 1 :]), "")
        if isinstance(known[key], float) and re.fullmatch(r"[+-]?\d+", value):
            checked[2 * i + 1] += ".0"
    return checked


def _flat(node: dict, prefix: str = "") -> dict:
    """Return all values by dotted key, nodes included."""
    values = {}
    for key, value in node.items():
        values[prefix + key] = value
        if isinstance(value, dict):
            values |= _flat(value, f"{prefix}{key}.")
    return values
