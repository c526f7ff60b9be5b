"""Keys that a method does not read: an error on the command line, a warning in a file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from dn_detr.d2.config.defaults import read_config
from dn_detr.errors import InputError
from dn_detr.layers.query_content import QueryContent
from dn_detr.methods import METHODS, config_class

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OURS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.stem[0].islower())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_all_hyper_parameters_that_it_declares(method):
    kind, read = config_class(method), set()
    names = {field.name for field in fields(kind)} - {"as_published"}  # read by build_model

    class Recorded(kind):
        def __getattribute__(self, name):
            if name in names:
                read.add(name)
            return object.__getattribute__(self, name)

    config = Recorded(num_classes=5, num_queries=4, channels=16, num_heads=2, feed_forward_dim=8)
    read.clear()
    content = QueryContent(channels=16, num_classes=5, has_labels=True, has_indicator=True)
    METHODS[method](config, [8] * 4, [4, 8, 16, 32], content)
    assert read == names


@pytest.mark.parametrize("path", OURS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_our_configurations_set_only_what_is_read(path, caplog):
    with caplog.at_level("WARNING"):
        read_config(str(path), [])
    assert not [text for text in caplog.messages if "no effect" in text]


def warning_of_file(base, name, value, tmp_path, caplog) -> str:
    """The one warning of a file that sets a key on top of `base`."""
    *parts, last = name.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)]
    mine = tmp_path / "mine.yaml"
    mine.write_text("\n".join([f"_BASE_: {base}", *lines, f"{'  ' * len(parts)}{last}: {value}\n"]))
    with caplog.at_level("WARNING"):
        read_config(str(mine), [])
    (text,) = [text for text in caplog.messages if "no effect" in text]
    return text


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("dino", "NUM_PATTERNS", "3"),
        ("detr", "NUM_LEVELS", "3"),
        ("conditional_detr", "SHARES_CONTENT", "True"),
        ("mask2former", "EPSILON", "0.01"),
        ("dn_deformable", "LOSS.MAL_GAMMA", "2.0"),
        ("dn_deformable", "LOSS.MASK_POINTS", "100"),
        ("dn_deformable", "BACKBONE", "timm/resnet18"),
        ("dn_deformable", "BACKBONE_WINDOW", "14"),
        ("dn_detr_vanilla", "LOSS.FOCAL_ALPHA", "0.5"),
        ("dn_faster_rcnn_fpn", "NUM_QUERIES", "10"),
    ],
)
def test_a_key_that_is_not_read_is_refused_on_the_command_line(file, key, value, tmp_path, caplog):
    path = next(CONFIGS.rglob(f"{file}.yaml"))
    name = f"MODEL.DN_DETR.{key}"
    with pytest.raises(InputError, match=f"{name} has no effect: .*"):
        read_config(str(path), [name, value])
    assert name in warning_of_file(path, name, value, tmp_path, caplog)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("dn_detr", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
        ("dn_detr", "TEST.AUG.ENABLED", "True"),
        ("dn_detr", "DATALOADER.ASPECT_RATIO_GROUPING", "True"),
        ("dn_detr", "DATALOADER.REPEAT_THRESHOLD", "0.1"),
        ("dn_detr", "VIS_PERIOD", "10"),
        ("dn_detr", "SOLVER.BIAS_LR_FACTOR", "2.0"),
        ("dn_detr", "SOLVER.MOMENTUM", "0.5"),
        ("dn_detr", "SOLVER.FLAT_ITERS", "10"),
        ("dn_detr", "SOLVER.BASE_LR_END", "0.1"),
        ("deim_dino", "SOLVER.STEPS", "[10]"),
        ("mask2former", "INPUT.MIN_SIZE_TRAIN", "[300]"),
        ("faster_rcnn_fpn", "MODEL.ROI_HEADS.NUM_CLASSES", "3"),
    ],
)
def test_a_key_of_detectron2_that_is_not_read_gives_a_warning(file, key, value, tmp_path, caplog):
    path = CONFIGS / f"{file}.yaml"
    with caplog.at_level("WARNING"):
        read_config(str(path), [key, value])
    assert f"the command sets keys that have no effect: {key} (" in caplog.messages[-1]
    caplog.clear()
    assert key in warning_of_file(path, key, value, tmp_path, caplog)


def test_keys_of_parts_that_are_switched_off_count_as_read():
    read_config(str(CONFIGS / "dino.yaml"), ["MODEL.DN_DETR.HYBRID.NUM_QUERIES", 10])
