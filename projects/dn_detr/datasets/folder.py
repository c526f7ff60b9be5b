"""Recognise a dataset folder: COCO, YOLO or Pascal VOC, in the layouts that are in use.

What is not in COCO's format is converted, what has no split is divided (`split.py`), and the json
files are kept in a cache by what they were made of.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dn_detr.datasets import split, voc, yolo
from dn_detr.datasets.cache import cache_folder, evict
from dn_detr.datasets.coco_json import IMAGE_SUFFIXES, CocoFile, read_bytes, read_text
from dn_detr.errors import InputError

RECORD = "dn_detr_split.json"
"""The file beside the data that lists the images of a split that was drawn."""

SPLITS = ("train", "val", "test")
_VERSION = 2  # increase when the same files give other results
_SPLIT = re.compile(r"(?<![a-z])(train|val|test)(?:val|ing|id|idation)?(?![a-z])")
_COCO_HEAD = re.compile(rb'"(?:images|annotations|categories)"\s*:\s*\[')
_HEAD = 1 << 16  # bytes that tell what a file is
_EXACT = re.compile(r"(instances_)?(train|val|valid|validation|test)(\d{4})?")
_OTHER_TASKS = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt")
_CHOOSE = "choose by DATASETS.ANNOTATIONS (--annotations) and DATASETS.IMAGES (--images)"

Pairs = list[tuple[Path, Path]]
"""Images, each with its annotation file."""


@dataclass
class Part:
    """One split: the content of a COCO file, and the folder its file_names are relative to."""

    content: dict
    images: Path
    json_file: Path | None = None
    """The user's file, if it has exactly this content."""


@dataclass
class Layout:
    """A recognised layout. `read` does what takes long: it opens every file."""

    name: str
    read: Callable[[], dict[str, Part]]
    files: list[Path]
    """Everything whose content matters."""
    notes: list[str] = field(default_factory=list)
    places: list[Path] = field(default_factory=list)
    """Other files, of which only the paths matter."""


@dataclass(frozen=True)
class Dataset:
    """A recognised folder.

    Args:
        sentence: what was recognised, for the log.
        files: train, val, test (those that exist) -> json file in COCO's format, image folder.
    """

    sentence: str
    files: dict[str, tuple[str, str]]


def read_folder(folder: str | Path, images: str = "", annotations: str = "") -> Dataset:
    """Recognise a folder and return its splits as files in COCO's format.

    Args:
        folder: the folder, or the data.yaml in it.
        images: folder of the images, relative to `folder`; "" looks everywhere in it.
        annotations: folder, file or pattern (`annotations/*2017.json`) of the annotations.

    Raises:
        InputError: if nothing is recognised, or more than one thing.
    """
    root = Path(folder).expanduser().absolute()
    if root.suffix in yolo.YAML_SUFFIXES and os.path.isfile(root):
        root, annotations = root.parent, root.name
    if not os.path.isdir(root):
        raise InputError(f"there is no folder {str(folder)!r} (DATASETS.FOLDER).")
    layout = recognise(root, images, annotations)
    place = cache_folder() / f"split_{_digest(str(root))}.json"
    records = root / RECORD, place
    outcome = _outcome(layout, root, records)
    if not outcome.is_file():
        _convert(layout, root, records)
        outcome = _outcome(layout, root, records)  # depends on the record, which is written now
    found = json.loads(outcome.read_text(encoding="utf-8"))
    return Dataset(found["sentence"], {key: tuple(paths) for key, paths in found["files"].items()})


# ------------------------------------------------------------------------------------- recognising


def recognise(root: Path, images: str = "", annotations: str = "") -> Layout:
    """Recognise the layout of a folder; see `read_folder`."""
    everything = _walk(root)
    pictures = [
        path
        for path in (_named(root, images, "IMAGES") if images else everything)
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    files = _named(root, annotations, "ANNOTATIONS") if annotations else everything
    layouts = (
        _coco(root, pictures, files),
        _yolo_with_yaml(root, files),
        _voc(root, pictures, files, everything),
    )
    found = [layout for layout in layouts if layout is not None]
    if not found:
        texts = {path.stem: path for path in files} if annotations else None
        found = [layout for layout in [_yolo(root, pictures, texts, everything)] if layout]
    if len(found) > 1:
        names = " and ".join(layout.name for layout in found)
        raise InputError(f"{root} holds {names}: {_CHOOSE}.")
    if not found:
        raise InputError(
            f"{root} is no dataset that is known: among {len(pictures)} images and "
            f"{len(files)} files there is neither a json file in COCO's format, nor a data.yaml or "
            "labels/*.txt of YOLO, nor xml files of Pascal VOC."
        )
    return found[0]


def _walk(root: Path) -> list[Path]:
    """List all files below a folder, sorted, without hidden ones; links are followed."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}.")

    found = []
    for parent, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        above = os.path.realpath(os.path.dirname(parent))
        if os.path.islink(parent) and above.startswith(os.path.realpath(parent)):
            folders.clear()  # a link to a folder above: a cycle
            continue
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        found += [Path(parent, name) for name in sorted(files) if not name.startswith(".")]
    return [path for path in found if path.name != RECORD]


def _named(root: Path, setting: str, key: str) -> list[Path]:
    """List the files that a setting names: a folder, a file or a pattern."""
    path = root / Path(setting).expanduser()
    named = [path] if os.path.exists(path) else [Path(p) for p in sorted(glob.glob(str(path)))]
    if not named:
        raise InputError(f"DATASETS.{key} (--{key.lower()}) is {setting!r}: {path} does not exist.")
    return [file for path in named for file in (_walk(path) if path.is_dir() else [path])]


def _split_of(root: Path, path: Path, *, with_name: bool = False) -> str:
    """Return train, val or test if a folder of the path (or the file) is called so, else ""."""
    path = Path(os.path.relpath(path, root))
    for part in (*([path.stem] if with_name else []), *reversed(path.parent.parts)):
        if found := _SPLIT.findall(part.lower()):
            return found[0]
    return ""


def _group(root: Path, paths: Iterable[Path], *, with_name: bool = False) -> dict[str, list[Path]]:
    """Group files by split; where nothing is called train, that is what is called nothing."""
    groups = defaultdict(list)
    for path in paths:
        groups[_split_of(root, path, with_name=with_name)].append(path)
    others = groups.pop("", [])
    if others and "train" not in groups:
        groups["train"] = others
    return dict(groups)


# -------------------------------------------------------------------------------------------- COCO


def _coco(root: Path, images: list[Path], files: list[Path]) -> Layout | None:
    """COCO's own layout, Roboflow's, and others with json files that tell their split."""
    found = [
        path
        for path in files
        if path.suffix == ".json" and _COCO_HEAD.search(read_bytes(path, _HEAD))
    ]
    found = [path for path in found if not path.name.startswith(_OTHER_TASKS)] or found
    if not found:
        return None
    groups = _group(root, found, with_name=True)
    for key, paths in groups.items():
        exact = [path for path in paths if _EXACT.fullmatch(path.stem.lower())]
        groups[key] = paths = exact if len(exact) == 1 else paths
        if len(paths) > 1:
            names = ", ".join(os.path.relpath(path, root) for path in paths[:4])
            raise InputError(
                f"{root} has {len(paths)} annotation files of {key} ({names}): {_CHOOSE}."
            )
    name = "COCO" + (" (Roboflow)" if found[0].name == "_annotations.coco.json" else "")
    jsons = {key: paths[0] for key, paths in groups.items()}
    return Layout(name, partial(_read_coco, root, jsons, images), [*jsons.values()], [], images)


def _read_coco(root: Path, jsons: dict[str, Path], images: list[Path]) -> dict[str, Part]:
    parts = {}
    for key, path in jsons.items():
        text = read_text(path)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not valid JSON: {error}.") from error
        if not isinstance(content, dict):
            raise InputError(f"{path} must hold an object with images, annotations and categories.")
        parts[key] = Part(content, path.parent, path)
    if not all(map(_is_sound, (part.content for part in parts.values()))):
        return parts  # the check of the annotations says what is wrong
    by_name = defaultdict(list)
    for image in map(str, images):
        by_name[os.path.basename(image)].append(image)
    for part in parts.values():
        _find_images(root, part, by_name, set(map(str, images)))
    return parts


def _is_sound(content: dict) -> bool:
    """Whether the content has the keys that are read here."""

    def has(key: str, **types: type | tuple[type, ...]) -> bool:
        entries = content.get(key) or []
        return isinstance(entries, list) and all(
            isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in types.items())
            for entry in entries
        )

    number = (int, str, float)
    return (
        has("images", file_name=str, id=number)
        and has("annotations", image_id=number, category_id=number)
        and has("categories", id=number, name=str)
    )


def _find_images(root: Path, part: Part, by_name: dict[str, list[str]], images: set[str]) -> None:
    """Find the folder that file_names are relative to; else find every image by its name alone."""
    entries = part.content.get("images") or []
    names = [entry["file_name"].replace("\\", "/") for entry in entries]
    key = _split_of(root, part.json_file, with_name=True)
    roots = {
        path.removesuffix(name)
        for name in names[:20]
        for path in by_name.get(os.path.basename(name), ())
        if path.endswith(f"/{name}")
    }

    def fitness(folder: str) -> tuple:
        same_split = _split_of(root, Path(folder, "a")) == key
        near = os.path.commonpath((folder, part.images))
        return sum(folder + name in images for name in names), same_split, len(near), folder

    best = max(roots, key=fitness, default="")
    alone = [by_name.get(os.path.basename(name), ()) for name in names]
    if best and all(best + name in images for name in names):
        part.images = Path(best)
    elif all(len(paths) == 1 for paths in alone):
        part.images, names = root, [os.path.relpath(path, root) for (path,) in alone]
    elif best:  # some images are missing, which the check of the images says
        part.images = Path(best)
    if names != [entry["file_name"] for entry in entries]:
        renamed = [{**e, "file_name": name} for e, name in zip(entries, names, strict=True)]
        part.content, part.json_file = {**part.content, "images": renamed}, None


# -------------------------------------------------------------------------------------------- YOLO


def _yolo_with_yaml(root: Path, files: list[Path]) -> Layout | None:
    """YOLO's data.yaml, whose paths are relative to it, to its `path`, or from another machine."""
    found = {}
    for path in files:
        if path.suffix in yolo.YAML_SUFFIXES and re.search(
            rb"(?m)^\W*names\W*:", read_bytes(path, _HEAD)
        ):
            data = yolo.read_data_yaml(path)
            if "train" in data or "val" in data:
                found[path] = data
    if not found:
        return None
    if len(found) > 1:
        names = ", ".join(os.path.relpath(path, root) for path in list(found)[:4])
        raise InputError(f"{root} has {len(found)} files like data.yaml ({names}): {_CHOOSE}.")
    [(path, data)] = found.items()
    if "kpt_shape" in data:
        raise InputError(f"{path} describes keypoints (kpt_shape), which are not supported.")
    pictures, notes = {}, []
    for key, entries in (("train", "train"), ("val", "val"), ("val", "valid"), ("test", "test")):
        if key not in pictures and data.get(entries):
            pictures[key] = _pictures_of(path, data, entries)
            if not pictures[key]:
                del pictures[key]
                notes.append(f"{path.name} names {data[entries]} for {entries}: no images there")
    if pictures.get("train") and pictures["train"] == pictures.get("val"):
        notes.append("val has the same images as train, so that AP says nothing of new images")
    pairs = {key: [(p, yolo.label_file_of(p)) for p in paths] for key, paths in pictures.items()}
    return _yolo_layout(root, f"YOLO ({path.name})", path, pairs, notes)


def _pictures_of(path: Path, data: dict, key: str) -> list[Path]:
    """List the images of a split: a folder, a list of images in a text file, or several of these.

    Raises:
        InputError: if there is no such folder or file; only a missing test set is let pass.
    """
    entries = data[key] if isinstance(data[key], list) else [data[key]]
    bases = [
        path.parent / str(data.get("path") or ""),
        Path(str(data.get("path") or "")),
        path.parent,
    ]
    found = []
    for entry in map(str, entries):
        parts = Path(entry).parts
        places = [base / entry for base in bases]
        places += [path.parent.joinpath(*parts[i:]) for i in range(1, len(parts))]
        place = next((place for place in places if os.path.exists(place)), None)
        if place is None and key == "test":
            continue
        if place is None:
            raise InputError(f"{path}: {key} is {entry!r}, but {places[0]} does not exist.")
        place = Path(os.path.normpath(place))
        if place.is_dir():
            found += [p for p in _walk(place) if p.suffix.lower() in IMAGE_SUFFIXES]
        else:
            lines = [line.strip() for line in read_text(place).splitlines() if line.strip()]
            found += [
                next(
                    (b / line for b in (place.parent, *bases) if os.path.isfile(b / line)),
                    Path(line),
                )
                for line in lines
            ]
    return [path.absolute() for path in found]


def _yolo(
    root: Path, images: list[Path], texts: dict[str, Path] | None, files: list[Path]
) -> Layout | None:
    """YOLO without data.yaml: text files in labels/ or beside the images, or `texts` by stem."""

    def label_of(image: Path) -> Path:
        if texts is None:
            return yolo.label_file_of(image)
        return texts.get(image.stem, image.with_suffix(".txt"))

    used = {image.parent for image in images if label_of(image).is_file()}
    if not used:
        return None
    named = [path for path in files if path.name in _NAME_FILES or path.suffix == ".names"]
    named += [
        p for p in files if p.suffix in yolo.YAML_SUFFIXES and b"names" in read_bytes(p, _HEAD)
    ]
    if not named:
        raise InputError(
            f"{root} has text files of YOLO, but no class names: add a data.yaml with `names`, or "
            "a classes.txt with a name on each line."
        )
    groups = _group(root, (image for image in images if image.parent in used))
    pairs = {key: [(image, label_of(image)) for image in group] for key, group in groups.items()}
    return _yolo_layout(root, f"YOLO ({named[0].name})", named[0], pairs, [])


def _yolo_layout(
    root: Path, name: str, names: Path, pairs: dict[str, Pairs], notes: list[str]
) -> Layout:
    def read() -> dict[str, Part]:
        class_names, parts = yolo.read_class_names(names), {}
        for key, group in pairs.items():
            top = _common(root, [image for image, _ in group])
            parts[key] = Part(yolo.from_pairs(group, class_names, top), top)
        labels = {text.parent for group in pairs.values() for _, text in group}
        used = {text for group in pairs.values() for _, text in group}
        extra = [p for folder in sorted(labels) for p in sorted(folder.glob("*.txt"))]
        extra = [p for p in extra if p not in used and p.name not in yolo.NO_LABELS]
        if extra:
            notes.append(f"{len(extra)} text files have no image, e.g. {extra[0].name}")
        return parts

    files = [names, *(path for group in pairs.values() for pair in group for path in pair)]
    return Layout(name, read, files, notes)


def _common(root: Path, paths: list[Path]) -> Path:
    """Return `root` if all paths are below it, else the folder that they are all below."""
    if all(path.is_relative_to(root) for path in paths):
        return root
    return Path(os.path.commonpath([path.parent for path in paths]))


# --------------------------------------------------------------------------------------------- VOC


def _voc(
    root: Path, images: list[Path], files: list[Path], everything: list[Path]
) -> Layout | None:
    """Pascal VOC: every xml file belongs to the image of its name, wherever they are."""
    xmls = [path for path in files if path.suffix.lower() == ".xml"]
    folders = {path.parent for path in xmls}
    first = {folder: next(p for p in xmls if p.parent == folder) for folder in folders}
    folders = {folder for folder in folders if b"<annotation" in read_bytes(first[folder], _HEAD)}
    xmls = [path for path in xmls if path.parent in folders]
    if not xmls:
        return None
    image_of = _images_of(root, xmls, images)
    notes = []
    if unused := set(images) - set(image_of.values()):
        notes.append(f"{len(unused)} images without xml file are left out, e.g. {min(unused).name}")
    lists = [
        p for p in everything if p.suffix == ".txt" and p.parent.parts[-2:] == ("ImageSets", "Main")
    ]
    lists = [path for path in lists if path.stem in ("train", "val", "test", "trainval")]
    if len({path.parent for path in lists}) > 1:
        raise InputError(f"{root} has several folders ImageSets/Main: name one year's folder.")
    groups, name = _group(root, xmls), "Pascal VOC"
    if lists:
        groups, name = _listed(lists, xmls), "Pascal VOC (ImageSets)"

    def read() -> dict[str, Part]:
        trees = {path: voc.parse_xml(path) for path in xmls}
        objects, parts = voc.Objects(list(trees.values())), {}
        notes.append(f"pixels counted from {objects.first_pixel}")
        for key, group in groups.items():
            top = _common(root, [image_of[path] for path in group])
            coco = CocoFile(objects.class_names)
            for path in group:
                objects.add(coco, trees[path], path, image_of[path], top)
            parts[key] = Part(coco.content, top)
        return parts

    return Layout(name, read, [*lists, *xmls, *image_of.values()], notes)


def _images_of(root: Path, xmls: list[Path], images: list[Path]) -> dict[Path, Path]:
    """Map xml files to images of the same name: the one that shares most of its path."""
    by_stem, found = defaultdict(list), {}
    for image in images:
        by_stem[image.stem].append(image)
    for path in xmls:
        near = [(len(os.path.commonpath((image, path))), image) for image in by_stem[path.stem]]
        if not near:
            raise InputError(f"{path} has no image {path.stem!r} in {root}.")
        found[path] = max(near)[1]
    taken = Counter(found.values())
    twice = [image for image in taken if taken[image] > 1]
    if twice:
        raise InputError(f"two xml files in {root} belong to one image, {twice[0]}: {_CHOOSE}.")
    return found


def _listed(lists: list[Path], xmls: list[Path]) -> dict[str, list[Path]]:
    """Group xml files by the lists in ImageSets/Main."""
    by_stem = {path.stem: path for path in xmls}
    names = {path.stem: voc.read_names(path) for path in lists}
    both = names.pop("trainval", [])
    names.setdefault("train", [name for name in both if name not in names.get("val", ())])
    groups = {}
    for key, listed in names.items():
        missing = [name for name in listed if name not in by_stem]
        if missing and len(missing) < len(listed):
            raise InputError(
                f"ImageSets/Main/{key}.txt lists {missing[0]!r}, which has no xml file."
            )
        if listed and not missing:  # VOC's own test lists come without annotations
            groups[key] = [by_stem[name] for name in listed]
    return groups


# ------------------------------------------------------------------------------------------- cache


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _outcome(layout: Layout, root: Path, records: tuple[Path, Path]) -> Path:
    """The file that says what was made of these files with this split; it may not exist."""
    stamps = [str(_VERSION), str(root), layout.name, *map(str, layout.places)]
    for path in (*records, *layout.files):
        status = os.stat(path) if os.path.isfile(path) else None
        stamps.append(f"{path} {status and (status.st_size, status.st_mtime_ns)}")
    return cache_folder() / f"folder_{_digest(*stamps)}" / "outcome.json"


def _convert(layout: Layout, root: Path, records: tuple[Path, Path]) -> None:
    """Read everything, split it if needed, and write what is no file of the user's."""
    parts, notes = layout.read(), layout.notes
    parts = {k: parts[k] for k in SPLITS if k in parts and parts[k].content.get("images")}
    if not parts:
        raise InputError(f"{root} is {layout.name}, but holds no images.")
    try:
        if set(parts) == {"train"}:
            whole = parts["train"]
            if not _is_sound(whole.content):
                raise InputError(
                    f"{whole.json_file} cannot be divided into train and val: its images need id "
                    "and file_name, its annotations image_id and category_id."
                )
            train, val, record = split.divide(whole.content, *records)
            parts = {"train": Part(train, whole.images), "val": Part(val, whole.images)}
            notes.append(f"no split was found: that of {record} is used, {split.SHARE:.0%} for val")
        outcome, files = _outcome(layout, root, records), {}
        for key, part in parts.items():
            json_file = part.json_file or outcome.parent / f"{key}.json"
            if part.json_file is None:
                split.write_whole(json_file, json.dumps(part.content))
            files[key] = (str(json_file), str(part.images))
        counts = ", ".join(f"{key} {len(part.content['images'])}" for key, part in parts.items())
        sentence = "; ".join([f"{root} is {layout.name} with images: {counts}", *notes])
        split.write_whole(outcome, json.dumps({"sentence": sentence, "files": files}))
        evict(outcome.parent)
    except OSError as error:
        raise InputError(
            f"what is made of {root} cannot be written ({error}): set DN_DETR_CACHE to a folder."
        ) from error
