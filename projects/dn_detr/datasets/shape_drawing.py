"""Drawing of the synthetic `shapes` dataset.

Classes differ only in outline: colour, texture, size, rotation and aspect ratio are random.
Distractors (lines, soft blobs, stripes, clouds, pixel noise) belong to no class. Coordinates are
pixels from the top left corner; pixel i covers [i, i + 1).
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("ellipse", "rectangle", "triangle", "star", "cross", "ring")
PICTURE_SIZES = ((160, 160), (160, 192), (192, 160), (144, 192), (192, 144))  # (height, width)
MAX_OBJECTS = 12
SMALLEST = 10  # longer side of the smallest box, in pixels; the largest is half of the picture
MIN_INSIDE = 0.6  # fraction of an object's area inside the picture
MIN_VISIBLE = 0.4  # fraction of an object's pixels not covered by later objects
MIN_CONTRAST = 70.0  # RGB distance between an object and the background it covers
_SUPERSAMPLING = 4


@dataclass(frozen=True, eq=False)
class Shape:
    """An object: `kind` indexes CLASSES; `polygon` [n, 2] xy in pixels, clipped to the picture."""

    kind: int
    polygon: np.ndarray


def polygon_area(polygon):
    """Return the area in square pixels, without the hole of a ring (connected by a slit)."""
    x, y = polygon[:, 0], polygon[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def polygon_box(polygon):
    """Return the tight box (x0, y0, x1, y1)."""
    return (*polygon.min(axis=0), *polygon.max(axis=0))


def outline(kind, rng):
    """Make a polygon [n, 2] of class `kind` around the origin, unrotated, in arbitrary units."""
    name = CLASSES[kind]
    if name in ("ellipse", "ring"):
        turn = np.linspace(0, 2 * math.pi, 41)
        circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
        if name == "ellipse":
            return circle[:-1]
        inner = circle[::-1] * rng.uniform(0.5, 0.65)
        return np.concatenate(
            [circle, inner]
        )  # outer circle, then the reversed hole, joined by a slit
    if name == "rectangle":
        return np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    if name == "cross":
        arm = rng.uniform(0.26, 0.36)
        corner = np.array([[arm, -1.0], [arm, -arm], [1.0, -arm], [1.0, arm]])
        return np.concatenate([corner, corner[::-1] * [1, -1], -corner, corner[::-1] * [-1, 1]])
    points = 3 if name == "triangle" else 10
    turn = np.arange(points) * 2 * math.pi / points
    radius = np.ones(points)
    if name == "star":
        radius[1::2] = rng.uniform(0.38, 0.48)
    return np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)


def place(polygon, size, centre, rng):
    """Stretch, rotate, scale the longer box side to `size`, and move to `centre` (x, y)."""
    polygon = polygon * [1.0, rng.uniform(0.6, 1.0)]
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    polygon = polygon @ np.array([[cos, sin], [-sin, cos]])
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    return (polygon - (low + high) / 2) * (size / (high - low).max()) + centre


def clip(polygon, height, width):
    """Clip a polygon to the picture (Sutherland-Hodgman); the result may be empty."""
    for axis, limit, sign in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        inside = sign * (polygon[:, axis] - limit) >= 0
        kept = []
        for i in range(len(polygon)):
            here, before = polygon[i], polygon[i - 1]
            if inside[i] != inside[i - 1]:
                share = (limit - before[axis]) / (here[axis] - before[axis])
                kept.append(before + share * (here - before))
            if inside[i]:
                kept.append(here)
        polygon = np.array(kept).reshape(-1, 2)
    return polygon


def coverage(polygon, height, width):
    """Compute the fraction of every pixel inside the polygon, [height, width] in [0, 1]."""
    alpha = np.zeros((height, width), np.float32)
    left, top = np.maximum(np.floor(polygon.min(axis=0)).astype(int) - 1, 0)
    right, bottom = np.minimum(np.ceil(polygon.max(axis=0)).astype(int) + 1, [width, height])
    window = Image.new("L", ((right - left) * _SUPERSAMPLING, (bottom - top) * _SUPERSAMPLING))
    points = (polygon - [left, top]) * _SUPERSAMPLING - 0.5  # PIL coordinates are pixel centres
    ImageDraw.Draw(window).polygon([tuple(point) for point in points.tolist()], fill=255)
    alpha[top:bottom, left:right] = np.asarray(window.reduce(_SUPERSAMPLING)) / 255
    return alpha


def random_colour(rng):
    """Draw an RGB colour [3] in [0, 255]."""
    return rng.uniform(0, 255, 3).astype(np.float32)


def stripes(rng, height, width):
    """Draw a wave [height, width, 1] in [-1, 1] with random direction and period."""
    angle, period = rng.uniform(0, math.pi), rng.uniform(4, 24)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
    return wave[:, :, None]


def clouds(rng, height, width, contrast):
    """Draw a smooth texture [height, width, 3] of colours within `contrast` of a random one."""
    cells = rng.integers(2, 8, 2)
    grid = random_colour(rng) + rng.uniform(-contrast, contrast, (*cells, 3))
    small = Image.fromarray(grid.clip(0, 255).astype(np.uint8))
    return np.asarray(small.resize((width, height), Image.BICUBIC), np.float32)


def paint(picture, alpha, colour):
    """Blend `colour` ([3] or [height, width, 3]) over the picture in place, by `alpha`."""
    picture += alpha[:, :, None] * (colour - picture)


def background(rng, height, width):
    """Draw a background [height, width, 3] of clouds, stripes, soft blobs and lines."""
    picture = clouds(rng, height, width, rng.uniform(10, 70))
    if rng.random() < 0.4:
        picture += rng.uniform(5, 30) * stripes(rng, height, width)
    for _ in range(rng.integers(0, 4)):
        turn = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        radius = 1 + 0.35 * np.sin(2 * turn + rng.uniform(0, 6)) + 0.25 * np.sin(3 * turn)
        blob = radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        blob = blob * rng.uniform(8, 35) + rng.uniform(0, 1, 2) * [width, height]
        alpha = coverage(clip(blob, height, width), height, width)
        soft = Image.fromarray((alpha * 255).astype(np.uint8))
        soft = soft.filter(ImageFilter.GaussianBlur(rng.uniform(3, 7)))
        paint(picture, np.asarray(soft, np.float32) / 255, random_colour(rng))
    canvas = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 7)):
        ends = rng.uniform(-0.1, 1.1, (2, 2)) * [width, height]
        colour = tuple(random_colour(rng).astype(int).tolist())
        draw.line([tuple(end) for end in ends.tolist()], colour, int(rng.integers(1, 4)))
    return np.asarray(canvas, np.float32).copy()


def fill(rng, height, width, colour):
    """Make the texture of an object, [height, width, 3] or [3], around `colour`."""
    style = rng.integers(3)
    if style == 0:
        return colour
    if style == 1:
        return colour + rng.uniform(10, 30) * stripes(rng, height, width)
    return colour + (clouds(rng, height, width, 30) - 127.5) * 0.15


def draw_picture(rng):
    """Draw one picture.

    Larger objects are drawn first. Objects that would cover an earlier one beyond MIN_VISIBLE are
    dropped. Polygons are full outlines, including parts covered by later objects.

    Returns:
        RGB picture, uint8 [height, width, 3], and a list of `Shape`.
    """
    height, width = PICTURE_SIZES[rng.integers(len(PICTURE_SIZES))]
    picture = background(rng, height, width)
    count = 0 if rng.random() < 0.05 else min(1 + int(rng.poisson(3.0)), MAX_OBJECTS)
    growth = math.log(min(height, width) / 2 / SMALLEST)
    sizes = SMALLEST * np.exp(growth * rng.beta(2.0, 1.5, count))
    shapes, visible, totals = [], [], []
    for size in sorted(sizes.tolist(), reverse=True):
        for _ in range(10):
            kind = int(rng.integers(len(CLASSES)))
            whole = place(outline(kind, rng), size, rng.uniform(0, 1, 2) * [width, height], rng)
            polygon = clip(whole, height, width)
            if len(polygon) < 3 or polygon_area(polygon) < MIN_INSIDE * polygon_area(whole):
                continue
            alpha = coverage(polygon, height, width)
            remaining = [pixels * (1 - alpha) for pixels in visible]
            if any(
                now.sum() < MIN_VISIBLE * all_of
                for now, all_of in zip(remaining, totals, strict=True)
            ):
                continue
            covered = np.average(picture.reshape(-1, 3), axis=0, weights=alpha.ravel())
            colour = random_colour(rng)
            while np.linalg.norm(colour - covered) < MIN_CONTRAST:
                colour = random_colour(rng)
            paint(picture, alpha, fill(rng, height, width, colour))
            visible = [*remaining, alpha]
            totals.append(alpha.sum())
            shapes.append(Shape(kind, polygon))
            break
    picture += rng.uniform(1, 10) * rng.standard_normal(picture.shape, np.float32)
    return picture.clip(0, 255).astype(np.uint8), shapes
