"""docs/recipes.md states the numbers that the configurations have."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from dn_detr.d2.config.defaults import read_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {
    path.stem: path
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if not path.stem.startswith("Base-")
}
TRAIN_IMAGES = 118287


def table() -> dict[str, dict[str, str]]:
    """Configuration -> cells by column."""
    lines = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    start = next(i for i, row in enumerate(rows) if row[0] == "configuration")
    return {
        row[0].strip("`"): dict(zip(rows[start], row, strict=True)) for row in rows[start + 2 :]
    }


def numbers(cfg) -> dict[str, str]:
    """The cells of a configuration, but for what the authors have instead."""
    node, solver = cfg.MODEL.DN_DETR, cfg.SOLVER
    noise, is_detr = node.DENOISING, cfg.MODEL.META_ARCHITECTURE == "DenoisingDETR"
    denoising = "-"
    if noise.ENABLED:
        groups = (
            f"{noise.NUM_GROUPS} groups" if noise.NUM_GROUPS else f"{noise.MAX_OBJECTS} objects"
        )
        denoising = f"{groups}, {noise.BOX_NOISE:g}, {noise.LABEL_NOISE:g}"
    queries = f"{node.NUM_QUERIES}" + (f" x {node.NUM_PATTERNS}" if node.NUM_PATTERNS else "")
    if node.NUM_GROUPS > 1:
        queries += f", {node.NUM_GROUPS} groups"
    if node.HYBRID.ENABLED:
        queries += f" + {node.HYBRID.NUM_QUERIES}"
    # Detectron2 trains on images with objects alone where empty ones are filtered out.
    images = 117266 if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else TRAIN_IMAGES
    epoch = images // solver.IMS_PER_BATCH + (images % solver.IMS_PER_BATCH > 0)
    epochs = [round(n / epoch, 1) for n in (solver.MAX_ITER, *solver.STEPS)]
    schedule = f"{epochs[0]:g}, " + ", ".join(f"{epoch:g}" for epoch in epochs[1:])
    if solver.LR_SCHEDULER_NAME == "WarmupFlatCosineLR":
        schedule = f"{epochs[0]:g}, flat-cosine"
    clip = solver.CLIP_GRADIENTS
    crop, jitter = cfg.INPUT.CROP.ENABLED, cfg.INPUT.SCALE_JITTER.ENABLED
    augmentation = "jitter" if jitter else "resize, crop" if crop else "resize"
    return {
        "queries": queries if is_detr else "-",
        "denoising": denoising,
        "learning rate": f"{solver.BASE_LR:g}, {solver.BACKBONE_MULTIPLIER:g}, "
        f"{solver.SAMPLING_MULTIPLIER:g}",
        "batch": f"{solver.IMS_PER_BATCH}",
        "epochs": schedule,
        "clip": f"{clip.CLIP_VALUE:g}" if clip.ENABLED else "-",
        "decay": f"{solver.WEIGHT_DECAY:g}",
        "augmentation": augmentation + (", mosaic, mixup" if cfg.INPUT.MOSAIC.ENABLED else ""),
        "top-k": f"{cfg.TEST.DETECTIONS_PER_IMAGE}",
        "weights": "/".join(cfg.MODEL.WEIGHTS.split("/")[-2:]),
    }


def test_every_configuration_has_a_recipe():
    assert set(table()) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recipe_has_the_numbers_of_its_configuration(name):
    cells = table()[name]
    for column, expected in numbers(read_config(str(CONFIGS[name]), [])).items():
        ours, _, theirs = cells[column].partition(" (theirs: ")
        assert ours == expected, column
        assert not theirs or theirs.removesuffix(")") != ours, column
    published = cells["published AP"].split(" ")[0].rstrip(",;")
    text = CONFIGS[name].read_text(encoding="utf-8")
    assert published == "-" or published in text, f"{published} is not in the file's comment"
