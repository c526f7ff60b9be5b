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
    *parts, last = name.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)]
    mine = tmp_path / "mine.yaml"
    mine.write_text("\n".join([f"_BASE_: {path}", *lines, f"{'  ' * len(parts)}{last}: {value}\n"]))
    with caplog.at_level("WARNING"):
        read_config(str(mine), [])
    (text,) = [text for text in caplog.messages if "no effect" in text]
    assert name in text


def test_keys_of_parts_that_are_switched_off_count_as_read():
    read_config(str(CONFIGS / "dino.yaml"), ["MODEL.DN_DETR.HYBRID.NUM_QUERIES", 10])
