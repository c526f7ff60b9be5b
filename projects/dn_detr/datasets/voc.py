"""Datasets in Pascal VOC format: Annotations/*.xml, JPEGImages/, ImageSets/Main/<split>.txt.

VOC counts pixels from 1 and includes the last one: xmin 1, xmax 500 spans 500 pixels. Many
annotation tools write distances from the image corner instead: xmin 0, xmax 500.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from dn_detr.datasets.coco_json import IMAGE_SUFFIXES, CocoFile, read_bytes, read_text
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
    names, images = _annotated(folder), _images(folder)
    trees = {name: parse_xml(folder / "Annotations" / f"{name}.xml") for name in names}
    objects = Objects(list(trees.values()), class_names, first_pixel)
    coco = CocoFile(objects.class_names)
    for name in names if split is None else _named(folder, split, trees):
        file = folder / "Annotations" / f"{name}.xml"
        if name not in images:
            raise InputError(f"{file} has no image {name!r} in {folder / 'JPEGImages'}.")
        objects.add(coco, trees[name], file, images[name], folder / "JPEGImages")
    return coco.content


class Objects:
    """How the objects of XML files are read.

    Args:
        trees: all files of the dataset.
        class_names: class names in order, None for those of all files, sorted.
        first_pixel: 1 as in VOC, 0 for distances from the corner, None for 0 if a box starts there,
            else 1.
    """

    def __init__(
        self,
        trees: list[ElementTree.Element],
        class_names: list[str] | None = None,
        first_pixel: int | None = None,
    ):
        entries = [entry for tree in trees for entry in tree.iter("object")]
        if class_names is None:
            class_names = sorted({entry.findtext("name", "").strip() for entry in entries} - {""})
        if first_pixel is None:
            starts = [e.findtext(f"bndbox/{key}", "").strip() for e in entries for key in CORNERS]
            first_pixel = 0 if {"0", "0.0"} & set(starts) else 1
        self.class_names = class_names
        self.first_pixel = first_pixel

    def add(
        self, coco: CocoFile, tree: ElementTree.Element, file: Path, image: Path, root: Path
    ) -> None:
        """Add an image below `root` and the objects of its XML file."""
        width, height = image_size(image)
        size = tree.find("size")
        if size is not None:
            stated = (_number(size, "width", file), _number(size, "height", file))
            if stated not in ((width, height), (0, 0)):  # some tools write (0, 0)
                raise InputError(
                    f"{file} gives a size of {stated[0]:g}x{stated[1]:g} pixels, but its image "
                    f"has {width}x{height}."
                )
        coco.add_image(image.relative_to(root).as_posix(), (width, height))
        for entry in tree.iter("object"):
            label = _text(entry, "name", file)
            if label not in self.class_names:
                raise InputError(
                    f"{file} has the class {label!r}, which is not in the class names."
                )
            is_crowd = entry.findtext("difficult", "0").strip() == "1"
            box = _box(entry, file, self.first_pixel)
            coco.add_object(self.class_names.index(label), box, is_crowd=is_crowd)


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
    names = read_names(path)
    for name in names:
        if name not in known:
            raise InputError(f"{path} lists {name!r}, which has no file in Annotations.")
    return names


def read_names(path: Path) -> list[str]:
    """Read a list of image names, one per line."""
    names = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path} lists no images.")
    return names


def _images(folder: Path) -> dict[str, Path]:
    """Map names without suffix to image files."""
    found = (folder / "JPEGImages").iterdir()
    return {path.stem: path for path in sorted(found) if path.suffix.lower() in IMAGE_SUFFIXES}


def parse_xml(path: Path) -> ElementTree.Element:
    """Parse an XML file; InputError if it is none."""
    try:
        return ElementTree.fromstring(read_bytes(path))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # also unknown encodings
        raise InputError(f"{path} is not valid XML: {error}.") from error


def _text(entry: ElementTree.Element, key: str, file: Path) -> str:
    text = entry.findtext(key, "").strip()
    if not text:
        raise InputError(f"{file}: a <{entry.tag}> has no <{key}>.")
    return text


def _number(entry: ElementTree.Element, key: str, file: Path) -> float:
    text = _text(entry, key, file)
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{file}: <{key}> must be a number, got {text!r}.") from None


def _box(entry: ElementTree.Element, file: Path, first_pixel: int) -> tuple[float, ...]:
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
