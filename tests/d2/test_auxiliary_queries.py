"""Training auxiliary queries together, and under all that a training can be switched to."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from samples import losses_in, sample, with_teacher
from test_accumulation import FROZEN, check_equal, gradients_and_losses, unequal_batch
from test_faster_rcnn import SMALL

from dn_detr.d2.engine.trainer import Trainer
from dn_detr.errors import InputError

QUICK = Path(__file__).resolve().parents[2] / "configs" / "quick"
KNOWN = ("MODEL.DN_DETR.BOX_PROMPTS.ENABLED", True, "MODEL.DN_DETR.BOX_PROMPTS.PROBABILITY", 1.0)
TEACH = ("MODEL.DN_DETR.TEACH.ENABLED", True)
GROUPS = ("MODEL.DN_DETR.NUM_GROUPS", 3)
HYBRID = ("MODEL.DN_DETR.HYBRID.ENABLED", True, "MODEL.DN_DETR.HYBRID.NUM_QUERIES", 20)
FEW_POINTS = ("MODEL.DN_DETR.LOSS.MASK_POINTS", 40)

CASES = {
    "prompts": ("dab_deformable", KNOWN),
    "prompts, noised, groups": ("dn_deformable", (*KNOWN, *GROUPS)),
    "prompts, contrastive, hybrid": ("dino", (*KNOWN, *HYBRID)),
    "taught, noised, groups": ("dn_deformable", (*TEACH, *GROUPS)),
    "taught, hybrid": ("h_deformable", (*TEACH, *HYBRID)),
    "taught, masks": ("mask_dino", (*TEACH, *FEW_POINTS)),
    "masks": ("mask2former", FEW_POINTS),
}
"""What is combined -> configuration file and further options."""


@pytest.fixture
def config_of(tiny_config):
    def config_of(name, *opts):
        file, more = CASES[name]
        return tiny_config(*more, *opts, config_file=QUICK / f"{file}.yaml")

    return config_of


def full_batch() -> list[dict]:
    """Unequal images: one has no object, another no box of the teacher."""
    return [with_teacher(s, n) for s, n in zip(unequal_batch(), (3, 4, 0, 1), strict=True)]


def check_gradients(model):
    """A weight without one would stop a training in several processes."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("name", CASES)
def test_any_batch_gives_the_same_losses_by_name_and_every_weight_a_gradient(config_of, name):
    """Where neither an image nor the teacher has objects, and where one of them has none. In mixed
    precision too, on the full batch."""
    torch.manual_seed(0)
    model = build_model(config_of(name))
    batches = [
        full_batch(),
        [with_teacher(sample(0, 2), 0)],
        [with_teacher(sample(1, 0), 2)],
        [with_teacher(sample(2, 0), 0)],
    ]
    names = set()
    for precision, batch in [(torch.bfloat16, full_batch()), *((None, b) for b in batches)]:
        is_mixed = precision is not None
        with EventStorage(), torch.autocast("cpu", dtype=precision, enabled=is_mixed):
            losses = model(batch)
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
        model.zero_grad()
        sum(losses.values()).backward()
        check_gradients(model)
        names.add(tuple(losses))
    (names,) = names
    for part in ("prompts", "taught", "groups", "hybrid"):
        label = {"prompts": "prompt", "taught": "teacher", "groups": "group"}.get(part, part)
        assert (part in name) == any(f"_{label}" in key for key in names), part


@pytest.mark.parametrize("name", [name for name in CASES if name != "masks"])
def test_parts_have_the_losses_and_gradients_of_the_whole(config_of, name):
    """(The class loss of Mask2Former is a mean over the batch: it has no parts.)"""
    cfg = config_of(name, *FROZEN)
    whole, losses = gradients_and_losses(cfg, 1, full_batch())
    parts, losses_of_parts = gradients_and_losses(cfg, 4, full_batch())
    check_equal(parts, losses_of_parts, whole, losses)


@pytest.fixture
def teacher_boxes(tiny_data, tmp_path) -> tuple:
    """Options: every second object of the tiny training data, as a teacher's results."""
    (name, json_file, _), _ = json.loads(tiny_data[1].replace("'", '"'))
    annotations = json.loads(Path(json_file).read_text())["annotations"][::2]
    keys = ("image_id", "category_id", "bbox")
    results = [{**{key: a[key] for key in keys}, "score": 0.5} for a in annotations]
    (tmp_path / "teacher.json").write_text(json.dumps(results))
    return "DATASETS.TEACHER_BOXES", str([[name, str(tmp_path / "teacher.json")]])


IN_PARTS = ("SOLVER.ACCUMULATE", 2, "MODEL.DN_DETR.RECOMPUTE", "['encoder', 'decoder']")
MEASURED = ("TEST.INSTABILITY.ENABLED", True)


@pytest.mark.parametrize(
    ("file", "more", "trained"),
    [
        (
            "dn_deformable",
            (*KNOWN, *GROUPS, *IN_PARTS, *MEASURED),
            ("loss_prompt", "loss_group"),
        ),
        (
            "mask_dino",
            (*TEACH, *FEW_POINTS, *IN_PARTS, *MEASURED),
            ("loss_ce_teacher", "loss_dice"),
        ),
        (
            "dn_mask2former",
            (*FEW_POINTS, "MODEL.DN_DETR.RECOMPUTE", "['decoder']"),
            ("loss_dice_dn",),
        ),
        (
            "dn_faster_rcnn_fpn",
            (*SMALL, "MODEL.DN_DETR.RECOMPUTE", "['backbone']"),
            ("loss_box_reg_dn",),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_training_with_all_that_there_is_resumes_bit_for_bit(
    file, more, trained, run, teacher_boxes, tmp_path
):
    """From a checkpoint amid mosaics and mixed images, in mixed precision, with activation
    checkpointing and a moving average; where possible in parts, with instability of matching."""
    options = (
        *(*more, *teacher_boxes, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2),
        *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.AMP.ENABLED", True, "SOLVER.EMA.ENABLED", True),
        *("INPUT.MOSAIC.ENABLED", True, "INPUT.MOSAIC.SIZE", 40, "INPUT.MIXUP.ENABLED", True),
        *("INPUT.MOSAIC.PROBABILITY", 0.7, "INPUT.MIXUP.PROBABILITY", 0.7),
        *("INPUT.SCHEDULE", "[1, 3, 4]"),
    )
    run(*options, config_file=QUICK / f"{file}.yaml")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.json").read_text().splitlines()]
    assert any({"bbox/AP", "ema/bbox/AP"} <= line.keys() for line in lines)
    is_measured = any("matching/anchor_distance" in line for line in lines)
    assert is_measured == (MEASURED[0] in more)
    losses = losses_in(tmp_path / "run")
    assert [line["iteration"] for line in losses] == [0, 1, 2, 3]
    (tmp_path / "run/last_checkpoint").write_text("model_0000001.pth")
    run(*options, "DATASETS.TEST", "()", flags=["--resume"], config_file=QUICK / f"{file}.yaml")
    assert losses_in(tmp_path / "run") == losses
    for loss in trained:
        assert any(line[loss] > 0 for line in losses), loss


@pytest.mark.parametrize(
    ("file", "opts", "reason"),
    [
        ("prompted_dn_deformable", TEACH, "TEACH and BOX_PROMPTS exclude each other"),
        ("mask_dino", KNOWN, "mask_dino predicts masks: only boxes can be given"),
        ("mask2former", TEACH, "can only teach a detector that predicts boxes"),
        ("faster_rcnn_fpn", KNOWN, "DenoisingRCNN has no queries"),
        ("faster_rcnn_fpn", TEACH, "DenoisingRCNN has no queries"),
        (
            "prompted_dn_deformable",
            ("MODEL.DN_DETR.AS_PUBLISHED", True),
            "box prompts need as_published False",
        ),
        (
            "prompted_dn_deformable",
            ("MODEL.DN_DETR.BOX_PROMPTS.PROBABILITY", 0.0),
            "probability must be in .0, 1.",
        ),
        ("h_deformable", GROUPS, "groups and hybrid matching exclude each other"),
    ],
)
def test_what_makes_no_sense_together_is_refused_with_a_reason(tiny_config, file, opts, reason):
    cfg = tiny_config(*opts, config_file=QUICK / f"{file}.yaml")
    with pytest.raises(InputError, match=f"the model cannot be built .*{reason}"):
        Trainer.build_model(cfg)
