"""Every shipped configuration builds a model that trains and detects."""

from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from samples import sample, with_teacher

from dn_detr.d2 import add_dn_detr_config
from dn_detr.d2.engine.checkpoint import CLASS_DEPENDENT, has_part
from dn_detr.d2.engine.trainer import Trainer
from dn_detr.d2.solver.optimizer import build_optimizer
from dn_detr.errors import InputError
from dn_detr.methods import METHODS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if path.stem[0].islower()  # Base-DETR and the like are no configurations of their own
    and path.parent.name != "backbones"  # which need timm and its downloads: test_backbones.py
)

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.DN_DETR.NUM_CLASSES": 3,
    "MODEL.DN_DETR.CHANNELS": 16,
    "MODEL.DN_DETR.NUM_HEADS": 2,
    "MODEL.DN_DETR.NUM_QUERIES": 9,
    "MODEL.DN_DETR.FEED_FORWARD_DIM": 16,
    "MODEL.DN_DETR.ENCODER_LAYERS": 1,
    "MODEL.DN_DETR.DECODER_LAYERS": 2,
    "MODEL.DN_DETR.HYBRID.NUM_QUERIES": 12,
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 100,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": -1.0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "TEST.DETECTIONS_PER_IMAGE": 5,
}


def read(name: str, **changes):
    """The configuration with small numbers: no downloads, milliseconds a step."""
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    opts = {**SMALL, **changes}
    cfg.merge_from_list([part for pair in opts.items() for part in pair])
    return cfg


def test_every_method_has_a_configuration():
    assert {read(name).MODEL.DN_DETR.METHOD for name in NAMES} == set(METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_trains_and_detects(name):
    cfg = read(name)
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    Trainer.build_lr_scheduler(cfg, optimizer)
    if cfg.SOLVER.WARMUP_ITERS == 0:
        assert max(group["lr"] for group in optimizer.param_groups) == cfg.SOLVER.BASE_LR

    keys = []
    for counts in ((3, 1), (0, 2), (0, 0)):
        batch = [sample(image, count) for image, count in enumerate(counts)]
        batch = [with_teacher(sample, len(sample["instances"])) for sample in batch]
        with EventStorage():  # Detectron2's own heads write into it
            losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        keys.append(list(losses))
        assert all(loss.isfinite() for loss in losses.values())
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # One without a gradient stops training in several processes.
                assert parameter.grad is not None, parameter_name
                assert parameter.grad.isfinite().all(), parameter_name
    assert keys[0] == keys[1] == keys[2]
    assert any("dn" in key for key in keys[0]) == cfg.MODEL.DN_DETR.DENOISING.ENABLED
    assert any("teacher" in key for key in keys[0]) == cfg.MODEL.DN_DETR.TEACH.ENABLED
    optimizer.step()

    model.eval()
    with torch.no_grad():
        (found,) = model([sample(1, 0)])
    assert len(found["instances"]) == 5
    assert found["instances"].pred_boxes.tensor.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_detectron2_alone_builds_every_configuration_at_full_size(name):
    """What a user of Detectron2 types; on the meta device only because it costs no time there."""
    cfg = get_cfg()
    add_dn_detr_config(cfg)
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    num_classes = 6 if name.startswith("quick") else 80
    if "rcnn" in name:
        assert model.roi_heads.num_classes == num_classes
    else:
        assert model.num_classes == num_classes == classes_of(model)


def classes_of(model) -> int:
    """Classes by the size of a class head."""
    head = next(v for k, v in model.state_dict().items() if ".class_head" in k and "bias" in k)
    return head.shape[0] - model.has_no_object


def test_a_number_of_classes_that_no_dataset_says_is_refused_in_a_sentence():
    cfg = read("dn_deformable.yaml", **{"MODEL.DN_DETR.NUM_CLASSES": 0, "DATASETS.TRAIN": "()"})
    with pytest.raises(InputError, match="NUM_CLASSES is 0 and DATASETS.TRAIN is empty: set"):
        build_model(cfg)


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpointer_knows_all_parameters_that_depend_on_the_classes(name):
    shapes = [
        {key: value.shape for key, value in build_model(read(name, **changes)).state_dict().items()}
        for changes in ({}, {"MODEL.DN_DETR.NUM_CLASSES": 4})
    ]
    changed = {key for key in shapes[0] if shapes[0][key] != shapes[1][key]}
    assert changed == {key for key in shapes[0] if has_part(key, CLASS_DEPENDENT)}


def test_a_dumped_configuration_is_read_back_unchanged(tmp_path):
    cfg = read("dn_deformable.yaml")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    add_dn_detr_config(again)
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
