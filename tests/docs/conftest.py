"""A folder in which the commands of the documents find the files that they name."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from doc_commands import ROOT, Command, blocks, reduced
from PIL import Image

TINY = """
    MODEL.RESNETS.STEM_OUT_CHANNELS 8  MODEL.RESNETS.RES2_OUT_CHANNELS 8
    MODEL.DN_DETR.CHANNELS 16  MODEL.DN_DETR.NUM_HEADS 2  MODEL.DN_DETR.NUM_QUERIES 12
    MODEL.DN_DETR.FEED_FORWARD_DIM 16  MODEL.DN_DETR.ENCODER_LAYERS 1
    MODEL.DN_DETR.DECODER_LAYERS 2  MODEL.DN_DETR.DENOISING.NUM_GROUPS 2
    INPUT.MIN_SIZE_TRAIN (64,)  INPUT.MAX_SIZE_TRAIN 96  INPUT.MIN_SIZE_TEST 64
    INPUT.MAX_SIZE_TEST 96  TEST.DETECTIONS_PER_IMAGE 10  SOLVER.IMS_PER_BATCH 2
    SOLVER.STEPS (2,)  SOLVER.WARMUP_ITERS 1  TEST.EVAL_PERIOD 2  LOG_PERIOD 1
    MODEL.DN_DETR.BACKBONE_PRETRAINED False
    DATASETS.TRAIN ('cells_train',)  DATASETS.TEST ('cells_val',)  DATASETS.COCO_FORMAT
    [['cells_train','cells/train.json','cells/images'],['cells_val','cells/val.json','cells/images']]
""".split()
"""What makes a quick configuration train at tens of iterations a second, on eight pictures."""

CHECKPOINTS = (
    "coco_detector.pth",
    "model.pth",
    "model_final.pth",
    "dn_detr_r50.pth",
    "output/bccd/model_final.pth",
    "output/cells/model_best.pth",
    "output/cells/model_final.pth",
    "output/demo/model_final.pth",
    "output/prompted_dn_deformable/model_final.pth",
    "output/dn_deformable/model_final.pth",
)
"""Names under which documents speak of a trained detector."""


@dataclass
class World:
    """The folder."""

    folder: Path

    def run(self, command: Command) -> None:
        """Run a command of a document, made small, in this process."""
        words = command.words[1:]
        if command.text.startswith("dn-detr"):
            self.call_command(words)
            return
        if words[0] == "train_net.py":
            words = reduced(words, [*TINY, "SOLVER.MAX_ITER", "2"])
            words.insert(1, "--overwrite")  # what `train_detectors` has put there
        self.call(words)

    def call_command(self, words: list[str]) -> None:
        """Run dn-detr in this process."""
        from dn_detr.cli.main import main

        if words[0] == "train":
            tiny = [*TINY, *(["SOLVER.MAX_ITER", "2"] if "--epochs" not in words else [])]
            words = [*reduced(words, tiny), "--overwrite", "--num-gpus", "0"]
        try:
            main(words)
        except SystemExit as end:
            assert not end.code, end.code

    def call(self, words: list[str]) -> None:
        """Run a program in this process, as if `words` were its command line."""
        before = sys.argv
        sys.argv = words[1:] if words[0] == "-m" else words
        try:
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
        finally:
            sys.argv = before


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Trained detectors, pictures and annotations under the names of the documents."""
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from dn_detr.datasets.shapes import generate

    folder = tmp_path_factory.mktemp("world")
    for name in ("configs", "tools", "examples", "dev", "train_net.py"):
        (folder / name).symlink_to(ROOT / name)
    for split in ("train", "val"):
        made = generate(folder / "made", split, num_images=8, seed=1)
        (folder / "cells" / "images").mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "annotations.json", folder / "cells" / f"{split}.json")
    give_pictures_names_of_their_own(folder)
    shutil.copy(folder / "cells" / "val.json", folder / "instances_val2017.json")
    pictures = sorted((folder / "cells" / "images").iterdir())
    shutil.copy(pictures[0], folder / "street.jpg")
    for name in ("pictures", "more", "holiday"):
        (folder / name).mkdir()
        Image.open(pictures[1]).save(folder / name / f"{name}.png")
    write_yaml_of_documents(folder)
    write_files_of_the_walk(folder, pictures[1])
    write_video(folder / "drive.mp4", pictures[:3])
    made = World(folder)
    before = os.getcwd()
    os.chdir(folder)
    try:
        train_detectors(made)
    finally:
        os.chdir(before)
    yield made
    for name in ("cells_train", "cells_val"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def train_detectors(world: World) -> None:
    """Two iterations of two methods, and what they left behind under the names of the documents."""
    for config, weights in (("dn_deformable", "made/model.pth"), ("dn_detr", "dn_detr_r50.pth")):
        output = f"made/{config}"
        settings = [*TINY, "SOLVER.MAX_ITER", "2", "SOLVER.EMA.ENABLED", "True"]
        options = ["--config-file", f"configs/quick/{config}.yaml", "--num-gpus", "0"]
        world.call(["train_net.py", *options, *settings, "OUTPUT_DIR", output])
        shutil.copy(f"{output}/model_final.pth", weights)
    for name in CHECKPOINTS:
        if not Path(name).exists():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy("made/model.pth", name)
    shutil.copy("made/dn_deformable/inference/coco_instances_results.json", ".")
    for name in ("denoised", "plain", "demo", "cells", "dn_deformable"):
        Path("output", name).mkdir(parents=True, exist_ok=True)
        for file in ("metrics.json", "config.yaml"):
            shutil.copy(f"made/dn_deformable/{file}", f"output/{name}/{file}")


def give_pictures_names_of_their_own(folder: Path) -> None:
    """Both splits are drawn under the same names: draw them apart."""
    images = folder / "cells" / "images"
    for split in ("train", "val"):
        path = folder / "cells" / f"{split}.json"
        content = json.loads(path.read_text())
        for image in content["images"]:
            name = f"{split}_{Path(image['file_name']).name}"
            made = folder / "made" / f"shapes_{split}" / "images" / image["file_name"]
            shutil.copy(made, images / name)
            image["file_name"] = name
        path.write_text(json.dumps(content))


def write_video(path: Path, pictures: list[Path]) -> None:
    import cv2

    frames = [cv2.resize(cv2.imread(str(picture)), (96, 64)) for picture in pictures]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5.0, (96, 64))
    for frame in frames:
        writer.write(frame)
    writer.release()


def write_yaml_of_documents(folder: Path) -> None:
    """The configuration that docs/custom_data.md tells its reader to write, on a quick one."""
    (text,) = blocks(ROOT / "docs" / "custom_data.md", "yaml")
    (folder / "cells.yaml").write_text(text.replace("configs/", "configs/quick/"))
    (text,) = blocks(ROOT / "docs" / "walkthrough.md", "yaml")
    (folder / "bccd.yaml").write_text(text)


def write_files_of_the_walk(folder: Path, picture: Path) -> None:
    """What docs/walkthrough.md calls BCCD, in all of its formats, are the drawn pictures."""
    for name in ("bccd/annotations", "bccd/test", "converted"):
        (folder / name).mkdir(parents=True)
    (folder / "bccd" / "images").symlink_to(folder / "cells" / "images")
    shutil.copy(picture, folder / "bccd" / "test" / "BloodImage_00007.jpg")
    write_video(folder / "bccd" / "test.mp4", [picture])
    for split, source in (("train", "train"), ("val", "val"), ("test", "val")):
        for name in ("bccd/annotations/instances", "converted/voc", "converted/yolo"):
            shutil.copy(folder / "cells" / f"{source}.json", folder / f"{name}_{split}.json")
