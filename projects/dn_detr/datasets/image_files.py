"""Reading of image files: the same rule in training, inference and checks.

Pixels become 8-bit RGB, turned by their EXIF orientation, in Pillow's mode of the file:

- 16 bits per channel: the upper 8 bits, so that 65535 becomes 255;
- transparency is ignored: a pixel keeps the colour that is stored under it, as in OpenCV;
- 32-bit integers and floating point are refused, because their range is unknown;
- all others (grey, palette, CMYK, YCbCr, ...) as `Image.convert("RGB")`.

Of several frames or pages the first is read. An image has at most `PIL.Image.MAX_IMAGE_PIXELS`
pixels (89,478,485 unless a program sets it; None: no limit), a protection against decompression
bombs. Needs only numpy and Pillow.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from dn_detr.errors import BadImage

_ORIENTATION = 274  # tag of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FIRST_TURNED = 5  # orientations from here on swap width and height
_TAIL = 4096  # bytes at the end of a file that are searched first
_MOST_LETTERS = 150  # of Pillow's reason in a sentence


def read_rgb(path: str | os.PathLike, name: str | None = None) -> np.ndarray:
    """Read an image file as uint8 RGB [height, width, 3].

    Args:
        path: File.
        name: What messages call it; None: its path.

    Raises:
        BadImage: If it is no regular file, no readable image, or too large.
    """
    with _opened(path, name) as image:
        return _to_rgb(image)


def rgb_of(image: Image.Image) -> np.ndarray:
    """Convert an image of Pillow as `read_rgb` does; BadImage if that is impossible."""
    with _sentences("the given image"):
        return _to_rgb(image)


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Read (width, height) in pixels after the EXIF orientation; BadImage as in `read_rgb`."""
    with _opened(path) as image:
        return _turned_size(image, image.getexif)


def check_image(
    path: str | os.PathLike, size: tuple | None = None, *, decodes: bool = False
) -> tuple[int, int]:
    """Check an image file by its header and by the mark at the end of JPEG and PNG files.

    The pixels are only decoded where these leave a doubt.

    Args:
        path: File.
        size: Width and height that its annotations state; None: unknown.
        decodes: Whether to decode the pixels in any case.

    Returns:
        (width, height) in pixels after the EXIF orientation.

    Raises:
        BadImage: As in `read_rgb`, or if the image has another size.
    """
    with _opened(path) as image:
        # Pillow's own `getexif` of a PNG decodes the image; orientation after the pixels is rare.
        found = _turned_size(image, lambda: Image.Image.getexif(image))
        _check_mode(image)
        is_sound = not decodes and size in (None, found) and _has_end(path, image.format)
    return found if is_sound else check_size(path, read_rgb(path), size)


def check_size(path: str | os.PathLike, pixels: np.ndarray, size: tuple | None) -> tuple[int, int]:
    """Return (width, height) of pixels [height, width, 3]; a BadImage unless it is `size`."""
    height, width = pixels.shape[:2]
    if size not in (None, (width, height)):
        raise BadImage(
            f"the image {os.fspath(path)!r} has {width}x{height} pixels, but its annotations say "
            f"{size[0]}x{size[1]}: correct width and height there."
        )
    return width, height


def fault_of(job: tuple[str, tuple | None, bool]) -> str | tuple[int, int]:
    """Call `check_image` with a (path, size, decodes); return its result, or the fault as text."""
    path, size, decodes = job
    try:
        return check_image(path, size, decodes=decodes)
    except BadImage as error:
        return str(error)


@contextlib.contextmanager
def _sentences(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises into a BadImage; its decoders raise nearly any exception.

    That no more files can be opened is not the image's fault and stays an OSError.
    """
    try:
        yield
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage(f"{name} does not exist.") from None
    except UnidentifiedImageError:  # its text names only a Python object
        raise BadImage(f"{name} cannot be read (unknown image format).") from None
    except Exception as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise
        reason = " ".join(f"{error}".split()).rstrip(".")[:_MOST_LETTERS] or type(error).__name__
        raise BadImage(f"{name} cannot be read ({reason}).") from error


@contextlib.contextmanager
def _opened(path: str | os.PathLike, name: str | None = None) -> Iterator[Image.Image]:
    name = f"the image {os.fspath(path) if name is None else name!r}"
    with _sentences(name):
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for ever
            raise BadImage(f"{name} is not a regular file.")
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise BadImage(
                    f"{name} has {image.width}x{image.height} pixels, more than the limit of "
                    f"{limit} (PIL.Image.MAX_IMAGE_PIXELS)."
                )
            yield image


def _orientation(read_exif) -> int:
    try:
        return read_exif().get(_ORIENTATION, 1)
    except Exception:  # EXIF data that cannot be parsed state no orientation
        return 1


def _turned_size(image: Image.Image, read_exif) -> tuple[int, int]:
    is_turned = _orientation(read_exif) in range(_FIRST_TURNED, max(_TURNS) + 1)
    return (image.height, image.width) if is_turned else image.size


def _check_mode(image: Image.Image) -> None:
    is_16_bit = image.mode == "I" and image.format in ("PNG", "PPM")  # so some versions of Pillow
    if image.mode in ("I", "F") and not is_16_bit:
        kind = "32-bit integers" if image.mode == "I" else "floating point numbers"
        raise ValueError(f"its pixels are {kind}, whose range is unknown: save them with 8 bits")


def _to_rgb(image: Image.Image) -> np.ndarray:
    _check_mode(image)
    image.load()  # PNG files may state their orientation behind the pixels
    turn = _TURNS.get(_orientation(image.getexif))
    if image.mode.startswith("I"):
        upper = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(upper.astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:  # else Pillow warns
        image = image.convert("RGBA")
    image = image.convert("RGB")
    return np.asarray(image if turn is None else image.transpose(turn))


def _has_end(path: str | os.PathLike, kind: str | None) -> bool:
    """Return whether a file has the end mark of its kind: JPEG and PNG; True for others."""
    with open(path, "rb") as file:
        if kind == "PNG":
            return b"IEND" in _from(file, max(8, os.path.getsize(path) - _TAIL))
        if kind not in ("JPEG", "MPO"):
            return True
        start = _start_of_scan(file)
        if start is None:
            return False
        # Inside the scan every 0xFF is followed by 0, but bytes of any number may follow its end,
        # and a preview before it has an end mark of its own.
        tail = max(start, os.path.getsize(path) - _TAIL)
        return b"\xff\xd9" in _from(file, tail) or b"\xff\xd9" in _from(file, start)


def _from(file: BinaryIO, position: int) -> bytes:
    file.seek(position)
    return file.read()


def _start_of_scan(file: BinaryIO) -> int | None:
    """Return the position of a JPEG's first scan; None if its segments are not as usual."""
    position = 2
    while True:
        file.seek(position)
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] == 0xFF:
            return None
        if head[1] == 0xDA:
            return position
        position += 2 + struct.unpack(">H", head[2:])[0]
