"""Datasets in Pascal VOC format: Annotations/*.xml, JPEGImages/, ImageSets/Main/<split>.txt.

VOC counts pixels from 1 and includes the last one: xmin 1, xmax 500 spans 500 pixels. Many
annotation tools write distances from the image corner instead: xmin 0, xmax 500.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from dn_detr.datasets.coco_json import IMAGE_SUFFIXES, CocoFile
from dn_detr.datasets.image_files import image_size
from dn_detr.errors import InputError

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def from_voc(
    folder: str | Path,
    *,
    split: str | None = None,
    class_names: list[str] | None = None,
    first_pixel: int = 1,
) -> dict:
    """Convert a VOC folder to the content of a COCO JSON file.

    Objects marked `difficult` become crowd regions, which training and evaluation ignore. Each
    file_name is relative to JPEGImages.

    Args:
        split: use the images listed in ImageSets/Main/<split>.txt, None for all annotated images.
        class_names: class names in order, None for those of all annotations in the folder,
            sorted.
        first_pixel: 1 as in VOC, 0 for distances from the corner.

    Raises:
        InputError: if a file is not in VOC format.
    """
    if first_pixel not in (0, 1):
        raise ValueError(f"first_pixel must be 0 or 1, got {first_pixel}")
    folder = Path(folder)
    names = _annotated(folder)
    trees = {name: _parse(folder / "Annotations" / f"{name}.xml") for name in names}
    if class_names is None:
        class_names = sorted(
            {_text(entry, "name", name) for name in names for entry in trees[name].iter("object")}
        )
    coco, images = CocoFile(class_names), _images(folder)
    for name in names if split is None else _named(folder, split, trees):
        file = f"{folder}/Annotations/{name}.xml"
        if name not in images:
            raise InputError(f"{file} has no image {name!r} in {folder / 'JPEGImages'}.")
        width, height = image_size(images[name])
        size = trees[name].find("size")
        if size is not None:
            stated = (_number(size, "width", file), _number(size, "height", file))
            if stated not in ((width, height), (0, 0)):  # some tools write (0, 0)
                raise InputError(
                    f"{file} gives a size of {stated[0]:g}x{stated[1]:g} pixels, but its image "
                    f"has {width}x{height}."
                )
        coco.add_image(images[name].relative_to(folder / "JPEGImages").as_posix(), (width, height))
        for entry in trees[name].iter("object"):
            label = _text(entry, "name", file)
            if label not in class_names:
                raise InputError(
                    f"{file} has the class {label!r}, which is not in the class names."
                )
            is_crowd = entry.findtext("difficult", "0").strip() == "1"
            coco.add_object(
                class_names.index(label), _box(entry, file, first_pixel), is_crowd=is_crowd
            )
    return coco.content


def _annotated(folder: Path) -> list[str]:
    annotations = folder / "Annotations"
    if not annotations.is_dir() or not (folder / "JPEGImages").is_dir():
        raise InputError(f"{folder} must contain the folders Annotations and JPEGImages.")
    names = sorted(path.stem for path in annotations.glob("*.xml"))
    if not names:
        raise InputError(f"{annotations} contains no XML files.")
    return names


def _named(folder: Path, split: str, known: dict) -> list[str]:
    """Read the image names of a split, one per line."""
    path = folder / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the split {split!r} cannot be read: {error}.") from error
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise InputError(f"{path} lists no images.")
    for name in names:
        if name not in known:
            raise InputError(f"{path} lists {name!r}, which has no file in Annotations.")
    return names


def _images(folder: Path) -> dict[str, Path]:
    """Map names without suffix to image files."""
    found = (folder / "JPEGImages").iterdir()
    return {path.stem: path for path in sorted(found) if path.suffix.lower() in IMAGE_SUFFIXES}


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise InputError(f"{path} is not valid XML: {error}.") from error


def _text(entry: ElementTree.Element, key: str, file: str) -> str:
    text = entry.findtext(key, "").strip()
    if not text:
        raise InputError(f"{file}: a <{entry.tag}> has no <{key}>.")
    return text


def _number(entry: ElementTree.Element, key: str, file: str) -> float:
    text = _text(entry, key, file)
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{file}: <{key}> must be a number, got {text!r}.") from None


def _box(entry: ElementTree.Element, file: str, first_pixel: int) -> tuple[float, ...]:
    """Read (left, top, right, bottom) as distances from the image corner."""
    corners = entry.find("bndbox")
    if corners is None:
        raise InputError(f"{file}: an <object> has no <bndbox>.")
    left, top, right, bottom = (_number(corners, key, file) for key in CORNERS)
    if min(left, top) == 0 and first_pixel == 1:
        raise InputError(
            f"{file} has a box that starts at 0, so pixels are not counted from 1 as in VOC: use "
            "--first-pixel 0."
        )
    return left - first_pixel, top - first_pixel, right, bottom
