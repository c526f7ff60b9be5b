"""Tables of names: everything finds its place, and what does not is named."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dn_detr.build import build_model, make_config
from dn_detr.conversion.convert_weights import COCO_CATEGORIES, convert, keep_coco_classes
from dn_detr.conversion.name_table import Table, attention
from dn_detr.conversion.tables import TABLES
from dn_detr.conversion.tables.conditional_detr_names import position_rows
from dn_detr.conversion.tables.h_deformable_names import content_rows

TABLE = Table(
    "somewhere",
    {
        "layers.{}.norm": "encoder.{}.norm",
        **attention("layers.{}.attn", "encoder.{}.attention"),
        "alias.{}": None,
        "extra.weight": "extra",
    },
    optional=frozenset({"extra.weight"}),
)


def full_state():
    return {
        "layers.3.norm.weight": torch.ones(2),
        "layers.3.norm.bias": torch.zeros(2),
        "layers.3.attn.in_proj_weight": torch.arange(12.0).reshape(6, 2),
        "layers.3.attn.in_proj_bias": torch.arange(6.0),
        "layers.3.attn.out_proj.weight": torch.ones(2, 2),
        "alias.0.weight": torch.ones(1),
        "alias.0.num_batches_tracked": torch.ones(1),
    }


def test_modules_keep_their_number_and_their_parts():
    ours, unknown, unused = TABLE.apply(full_state())
    assert not unknown and not unused
    assert sorted(ours) == [
        "core.encoder.3.attention.k.bias",
        "core.encoder.3.attention.k.weight",
        "core.encoder.3.attention.out.weight",
        "core.encoder.3.attention.q.bias",
        "core.encoder.3.attention.q.weight",
        "core.encoder.3.attention.v.bias",
        "core.encoder.3.attention.v.weight",
        "core.encoder.3.norm.bias",
        "core.encoder.3.norm.weight",
    ]
    assert ours["core.encoder.3.attention.k.weight"].tolist() == [[4, 5], [6, 7]]
    assert ours["core.encoder.3.attention.v.bias"].tolist() == [4, 5]


def test_leftovers_on_either_side_are_named():
    state = full_state()
    del state["layers.3.norm.weight"], state["layers.3.norm.bias"]
    state["surprise.weight"] = torch.ones(1)
    _, unknown, unused = TABLE.apply(state)
    assert unknown == ["surprise.weight"]
    assert unused == ["layers.{}.norm"]


def test_a_checkpoint_of_another_method_is_refused_with_what_is_left_over():
    with pytest.raises(ValueError, match="parameters have no rule.*these are missing"):
        convert(full_state(), "conditional_detr")
    with pytest.raises(ValueError, match="no table for 'nothing'"):
        convert(full_state(), "nothing")


@pytest.mark.parametrize("method", TABLES)
def test_no_two_rules_of_a_table_give_the_same_name(method):
    for table in TABLES[method]:
        names = [
            name
            for rule in table.rules.values()
            if isinstance(rule, (str, tuple))
            for name in ((rule,) if isinstance(rule, str) else rule)
        ]
        assert len(set(names)) == len(names), table.source


@pytest.mark.parametrize(("rows", "own"), [(300, 300), (1800, 300), (900, 900), (2400, 900)])
def test_h_deformable_has_300_or_900_one_to_one_queries(rows, own):
    split = content_rows(torch.arange(float(rows))[:, None])
    assert split.pop("query_design.learned.content").flatten().tolist() == list(range(own))
    assert [len(part) for part in split.values()] == ([rows - own] if rows > own else [])


def test_a_file_of_group_detr_gives_the_first_group_and_ten_auxiliary_ones():
    """As the groups of `build_model(..., num_groups=11)` are named."""
    split = position_rows(torch.arange(3300.0)[:, None])
    assert split["query_design.learned.position"].flatten().tolist() == list(range(300))
    config = make_config("conditional_detr", num_classes=2, channels=32, num_heads=4)
    with torch.device("meta"):
        model = build_model(
            "conditional_detr", config, in_channels=[8], strides=[32], num_groups=11
        )
    assert {n for n, _ in model.named_parameters() if ".learned." in n} == set(split)
    assert split["auxiliary.0.learned.9.position"][0] == 3000
    assert list(position_rows(torch.zeros(300, 1))) == ["query_design.learned.position"]


def test_the_80_categories_are_taken_out_of_raw_numbers():
    assert len(COCO_CATEGORIES) == 80
    assert COCO_CATEGORIES[0] == 1 and COCO_CATEGORIES[-1] == 90  # person, toothbrush
    assert COCO_CATEGORIES[11] == 13  # stop sign, after the absent street sign
    rows = torch.arange(92.0)[:, None]
    kept = keep_coco_classes(
        {
            "core.decoder.predictor.heads.class_heads.0.weight": rows[:91],
            "core.query_design.content.label_embedding.weight": rows,
            "core.encoder.norm": rows,
        }
    )
    heads = kept["core.decoder.predictor.heads.class_heads.0.weight"]
    assert heads.flatten().tolist() == list(COCO_CATEGORIES)
    labels = kept["core.query_design.content.label_embedding.weight"]
    assert labels.flatten().tolist() == [*COCO_CATEGORIES, 91]  # "unknown" stays
    assert kept["core.encoder.norm"].shape == (92, 1)


def test_a_head_of_other_classes_cannot_be_taken_for_raw_numbers():
    with pytest.raises(ValueError, match="80 or 91 rows of COCO's classes, got 20"):
        keep_coco_classes({"core.decoder.predictor.heads.class_heads.0.bias": torch.ones(20)})


@pytest.mark.parametrize(
    ("rows", "empty_classes", "kept"),
    [
        (80, 0, range(80)),  # Mask DINO
        (81, 0, range(81)),  # Mask2Former, with "no object"
        (92, 0, [*COCO_CATEGORIES, 91]),  # DETR, with "no object"
        (92, 1, COCO_CATEGORIES),  # SMCA, with a row that no object has
        (1, 0, [0]),  # two-stage Deformable DETR
    ],
)
def test_the_80_categories_are_found_whatever_rows_a_head_has(rows, empty_classes, kept):
    state = {"core.query_design.heads.class_head.bias": torch.arange(rows)}
    (bias,) = keep_coco_classes(state, empty_classes).values()
    assert bias.tolist() == list(kept)
    assert TABLES["smca"][0].empty_classes == 1


def other_method(path):
    torch.save({"model": full_state()}, path)


def cut_off(path):
    torch.save({"model": {"a": torch.zeros(100, 100)}}, path)
    path.write_bytes(path.read_bytes()[:20_000])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (other_method, "not a checkpoint of detr"),
        (cut_off, "is damaged"),
        (lambda path: path.write_text("no weights"), "is damaged or was not written by torch.save"),
        (lambda _path: None, "cannot be read: No such file"),
    ],
)
def test_the_tool_says_in_one_line_what_is_wrong(tmp_path, make, words):
    path = tmp_path / "checkpoint.pth"
    make(path)
    tool = [sys.executable, "-m", "dn_detr", "convert", "weights", "--method", "detr"]
    result = subprocess.run(
        [*tool, path, "--output", tmp_path / "out.pth"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert words in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.startswith(f"dn-detr convert: {path}")
    assert not (tmp_path / "out.pth").exists()


def test_a_stacked_parameter_that_does_not_divide_is_refused():
    """Anchor DETR with ordinary attention was cut into 154, 154, 154, 154 and 152 rows."""
    table = Table("a test", {"attn.in_proj_weight": tuple(f"a.{i}.weight" for i in range(5))})
    with pytest.raises(ValueError, match=r"shape \[768, 256\] cannot be split into 5 equal parts"):
        table.apply({"attn.in_proj_weight": torch.zeros(768, 256)})
