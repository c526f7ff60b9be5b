"""Every kind of image file becomes the pixels that the stated rule gives, or one sentence."""

import io
import os
import signal
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dn_detr.datasets.image_files import check_image, image_size, read_rgb, rgb_of
from dn_detr.errors import BadImage


def noise(height=20, width=30, channels=3, seed=0, high=256):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(high, size=shape)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(path, values):
    """Write values [height, width] or [height, width, 3] as a PNG with 16 bits per channel."""
    height, width = values.shape[:2]
    kind = 0 if values.ndim == 2 else 2
    rows = values.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(raw))
        + png_chunk(b"IEND", b"")
    )


# ------------------------------------------------------------------------------------ the pixels


@pytest.mark.parametrize("channels", [1, 3])
def test_of_16_bits_the_upper_8_stay_in_grey_and_in_colour(tmp_path, channels):
    values = noise(channels=channels, high=65536)
    deep_png(tmp_path / "a.png", values)
    pixels = read_rgb(tmp_path / "a.png")
    assert pixels.dtype == np.uint8 and pixels.shape == (20, 30, 3)
    assert np.abs(pixels - (values / 257).reshape(20, 30, channels)).max() <= 1  # 65535 -> 255
    check_image(tmp_path / "a.png", (30, 20), decodes=True)


@pytest.mark.parametrize(("kind", "name"), [("<u2", "a.tif"), (">u2", "a.tif"), ("<u2", "a.pgm")])
def test_other_files_with_16_bits_are_scaled_in_the_same_way(tmp_path, kind, name):
    values = noise(channels=1, high=65536).astype(kind)
    Image.fromarray(values).save(tmp_path / name)
    np.testing.assert_array_equal(
        read_rgb(tmp_path / name), np.repeat((values >> 8)[..., None], 3, 2)
    )


@pytest.mark.parametrize(("kind", "words"), [("float32", "floating"), ("int32", "32-bit int")])
def test_pixels_of_unknown_range_are_refused(tmp_path, kind, words):
    image = Image.fromarray(noise(channels=1).astype(kind))
    image.save(tmp_path / "a.tif")
    for use in (read_rgb, check_image):
        with pytest.raises(BadImage, match=rf"a.tif' cannot be read .*{words}"):
            use(tmp_path / "a.tif")
    with pytest.raises(BadImage, match=words):
        rgb_of(image)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_ignored(tmp_path, mode):
    pixels = noise(channels=3)
    image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
    image.putalpha(Image.fromarray(noise(channels=1, seed=1).astype(np.uint8)))
    image.save(tmp_path / "a.png")
    wanted = pixels if mode == "RGBA" else np.asarray(image.getchannel("L"))[..., None]
    np.testing.assert_array_equal(
        read_rgb(tmp_path / "a.png"), np.broadcast_to(wanted, (20, 30, 3))
    )


@pytest.mark.filterwarnings("error")
def test_a_palette_gives_its_colours_with_and_without_transparency(tmp_path):
    colours = np.random.default_rng(0).integers(256, size=(256, 3)).astype(np.uint8)
    indices = noise(channels=1).astype(np.uint8)
    image = Image.fromarray(indices, "L").copy()
    image.putpalette(colours.tobytes())
    for transparency in (None, 3, bytes(range(256))):
        image.save(tmp_path / "a.png", transparency=transparency)
        np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), colours[indices])


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    assert (read_rgb(tmp_path / "a.tif") == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_images_are_turned_as_exif_says(tmp_path, orientation, suffix):
    image = Image.fromarray(noise().astype(np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif, quality=95)
    with Image.open(path) as again:
        wanted = np.asarray(ImageOps.exif_transpose(again))  # an independent implementation
    np.testing.assert_array_equal(read_rgb(path), wanted)
    assert image_size(path) == wanted.shape[1::-1]
    check_image(path, wanted.shape[1::-1])


def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    Image.new("RGB", (6, 4)).save(buffer, "png")
    content = buffer.getvalue()
    late = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "a.png").write_bytes(content[:-12] + late + content[-12:])
    assert read_rgb(tmp_path / "a.png").shape == (6, 4, 3)
    check_image(tmp_path / "a.png", (4, 6))


def test_exif_that_cannot_be_parsed_turns_nothing(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_rgb(tmp_path / "a.jpg").shape == (4, 6, 3)


# ------------------------------------------------------------------------------ what is refused


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    signal.alarm(60)  # opening the FIFO would wait for ever
    for use in (read_rgb, check_image, image_size):
        for path in (tmp_path / "a.png", tmp_path):
            with pytest.raises(BadImage, match="is not a regular file"):
                use(path)
    signal.alarm(0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_more_pixels_than_the_limit_are_refused_and_the_limit_is_stated(tmp_path, monkeypatch):
    Image.new("1", (10000, 9000)).save(tmp_path / "a.png")
    for use in (read_rgb, check_image, image_size):
        with pytest.raises(BadImage, match=r"a.png' has 10000x9000 pixels, more than .* 89478485"):
            use(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    check_image(tmp_path / "a.png", (10000, 9000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself refuses twice as many
    with pytest.raises(BadImage, match=r"exceeds limit"):
        read_rgb(tmp_path / "a.png")


def test_faults_are_one_short_sentence_with_the_name(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    for path, words in [
        (tmp_path / "none.png", "none.png' does not exist."),
        (tmp_path / "a.png", "a.png' cannot be read .unknown image format.."),
        ("a\0b.png", "cannot be read .*null"),
    ]:
        with pytest.raises(BadImage, match=words) as caught:
            read_rgb(path)
        assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
    with pytest.raises(BadImage, match=r"the image 'b' cannot be read"):
        read_rgb(tmp_path / "a.png", "b")


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it meets
def test_any_damage_gives_pixels_or_a_sentence(tmp_path):
    """2,000 damaged files of five kinds: never another exception, and check agrees with reading."""
    rng, sound = np.random.default_rng(0), []
    image = Image.fromarray(noise().astype(np.uint8))
    for kind in ("png", "jpeg", "gif", "tiff", "webp"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        sound.append(buffer.getvalue())
    refused = 0
    for i in range(2000):
        content = bytearray(sound[i % len(sound)])
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        path = tmp_path / "a"
        path.write_bytes(content[: rng.integers(len(content))] if i % 3 == 0 else content)
        outcomes = []
        for use in (read_rgb, lambda path: check_image(path, decodes=True)):
            try:
                use(path)
                outcomes.append(None)
            except BadImage as error:
                outcomes.append(str(error))
                assert len(str(error)) < 400 and "\n" not in str(error)
        assert (outcomes[0] is None) == (outcomes[1] is None), outcomes
        refused += outcomes[0] is not None
    assert refused > 500


# ---------------------------------------------------------------------------------- truncation


def with_preview(path, quality=90):
    """A JPEG whose EXIF data hold a small JPEG with an end mark of its own."""
    preview = io.BytesIO()
    Image.fromarray(noise(8, 8).astype(np.uint8)).save(preview, "jpeg")
    image = Image.fromarray(noise(200, 300).astype(np.uint8))
    image.save(path, quality=quality, exif=b"Exif\0\0" + preview.getvalue())
    return path.read_bytes()


def test_a_jpeg_that_is_cut_off_is_found_without_decoding_sound_ones(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    content = with_preview(path)
    with monkeypatch.context() as context:
        context.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
        for trailing in (b"", b"\0" * 50, b"a video of the phone" * 20000):
            path.write_bytes(content + trailing)
            check_image(path, (300, 200))
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(BadImage, match=r"a.jpg' cannot be read .*truncated"):
            check_image(path, (300, 200))
        assert image_size(path) == (300, 200)  # the header alone is sound


def test_a_progressive_jpeg_is_sound_and_cut_off_as_well(tmp_path):
    image = Image.fromarray(noise(200, 300).astype(np.uint8))
    image.save(tmp_path / "a.jpg", progressive=True)
    check_image(tmp_path / "a.jpg", (300, 200))
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadImage, match="truncated"):
        check_image(tmp_path / "a.jpg")


def test_a_png_that_is_cut_off_is_found(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(noise(200, 300).astype(np.uint8)).save(path)
    content = path.read_bytes()
    with monkeypatch.context() as context:
        context.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
        for trailing in (b"", b"\0" * 50):
            path.write_bytes(content + trailing)
            check_image(path, (300, 200))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadImage, match=r"a.png' cannot be read"):
        check_image(path, (300, 200))


def test_damage_in_the_middle_is_found_by_decoding(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(200, 300).astype(np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    check_image(path)
    with pytest.raises(BadImage, match=r"a.png' cannot be read"):
        check_image(path, decodes=True)


def test_another_size_than_stated_is_a_fault(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match=r"a.png' has 30x20 pixels, .* say 20x30: correct"):
        check_image(tmp_path / "a.png", (20, 30))
