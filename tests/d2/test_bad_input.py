"""Whatever is wrong with the user's input is said in one sentence, and the exit status is not 0."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from coco_files import forget, make_content, write
from PIL import Image

import dn_detr
from dn_detr.d2.data.ground_truth import read_coco
from dn_detr.d2.engine.trainer import reason_of
from dn_detr.errors import InputError


@pytest.fixture
def answer(run):
    """What a run with these options says before it ends, without "train_net.py: "."""

    def answer(*opts, **more) -> str:
        with pytest.raises(SystemExit) as caught:
            run(*opts, **more)
        said = caught.value.code  # Python prints it to stderr and exits with status 1
        assert isinstance(said, str) and "\n" not in said and said.startswith("train_net.py: ")
        return said.removeprefix("train_net.py: ")

    yield answer
    forget("broken")


def options_for(json_file, image_root) -> list[str]:
    return [
        *("DATASETS.COCO_FORMAT", str([["broken", str(json_file), str(image_root)]])),
        *("DATASETS.TRAIN", "('broken',)", "DATASETS.TEST", "()"),
    ]


# -------------------------------------------------------------------------------------- datasets


def no_annotation_file(folder):
    (folder / "a.json").unlink()


def cut_off_annotation_file(folder):
    text = (folder / "a.json").read_text()
    (folder / "a.json").write_text(text[: len(text) // 2])


def no_image_file(folder):
    (folder / "images" / "12.png").unlink()


def no_image_inside(folder):
    (folder / "images" / "12.png").write_text("no picture")


def damaged_image(folder):
    """Its header is sound, so that only training finds it."""
    Image.effect_noise((60, 40), 50).convert("RGB").save(folder / "images" / "12.png")
    content = (folder / "images" / "12.png").read_bytes()
    (folder / "images" / "12.png").write_bytes(content[: len(content) // 2])


def unknown_category(folder):
    content = make_content()
    content["annotations"][0]["category_id"] = 99
    write(folder, content)


def no_images(folder):
    write(folder, {**make_content(), "images": [], "annotations": []})


def no_boxes(folder):
    write(folder, {**make_content(), "annotations": []})


def test_without_data_one_sentence_says_where_they_were_looked_for_and_what_to_do():
    with pytest.raises(InputError) as caught:
        read_coco("datasets/coco/annotations/instances_train2017.json")
    sentence = str(caught.value)
    assert sentence.startswith(
        "there is no annotation file datasets/coco/annotations/instances_train2017.json "
        f"(working directory {os.getcwd()}): "
    )
    assert "`export DETECTRON2_DATASETS=FOLDER`" in sentence
    quick = re.search("--config-file (.*?)`", sentence)[1]
    assert (Path(__file__).parents[2] / quick).is_file()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_annotation_file, ("a.json", "there is no annotation file")),
        (cut_off_annotation_file, ("a.json", "not valid JSON")),
        (no_image_file, ("12.png", "1 of the 4 images", "does not exist")),
        (no_image_inside, ("12.png", "cannot be read")),
        (damaged_image, ("12.png", "cannot be read")),
        (unknown_category, ("annotations[0]", "category_id 99")),
        (no_images, ("a.json", "no images")),
        (no_boxes, ("broken", "no boxes")),
    ],
)
def test_a_faulty_dataset(answer, tmp_path, spoil, words):
    paths = write(tmp_path, make_content())
    spoil(tmp_path)
    said = answer(*options_for(*paths), "SOLVER.IMS_PER_BATCH", 4)
    assert all(word in said for word in words), said
    log = tmp_path / "run" / "log.txt"
    assert not log.exists() or "Traceback" not in log.read_text()


def test_a_damaged_image_in_a_worker_process(answer, tmp_path):
    paths = write(tmp_path, make_content())
    damaged_image(tmp_path)
    said = answer(*options_for(*paths), *("SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 1))
    assert "12.png" in said and "cannot be read" in said


def test_boxes_without_size_are_no_error_but_dropped_and_reported(run, tmp_path):
    paths = write(tmp_path, make_content())
    run(*options_for(*paths), *("SOLVER.MAX_ITER", 1))
    forget("broken")
    report = (tmp_path / "run" / "log.txt").read_text()
    assert "dropped    boxes without size: 2 (" in report
    assert "12.png [8, 9, 0, 12]" in report


# --------------------------------------------------------------------------------- configuration


RESNET = ["MODEL.BACKBONE.NAME", "build_resnet_backbone"]


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["MODEL.DN_DETR.NUM_CLASSES", 3], ("NUM_CLASSES is 3", "6 classes")),
        (
            ["MODEL.DN_DETR.NUM_QUERYS", 3],
            ("command line", "Non-existent key", "did you mean MODEL.DN_DETR.NUM_QUERIES"),
        ),
        (["SOLVER.MAX_ITER", "many"], ("SOLVER.MAX_ITER", "many")),
        (["SOLVER.MAX_ITER"], ("odd length",)),
        (["MODEL.DN_DETR.METHOD", "yolo"], ("no method 'yolo'", "dab_deformable")),
        (["MODEL.DN_DETR.NUM_HEADS", 3], ("num_heads 3",)),
        (["MODEL.DN_DETR.IN_FEATURES", "['res4', 'p3']"], ("MODEL.DN_DETR.IN_FEATURES has 'p3'",)),
        (
            [*RESNET, "MODEL.RESNETS.DEPTH", 18],
            ("cannot be built", "Must set MODEL.RESNETS.RES2_OUT_CHANNELS = 64"),
        ),
        ([*RESNET, "MODEL.RESNETS.OUT_FEATURES", "['res9']"], ("cannot be built", "Available ch")),
        (["MODEL.META_ARCHITECTURE", "Detector"], ("Detector", "META_ARCH")),
        (["SOLVER.OPTIMIZER", "LION"], ("'ADAMW' or 'SGD'", "'LION'")),
        (["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "half"], ("bfloat16", "'half'")),
        (["DATASETS.TRAIN", "('tiny_trian',)"], ("tiny_trian", "did you mean 'tiny_train'")),
        (["MODEL.WEIGHTS", "nowhere.pth"], ("no checkpoint 'nowhere.pth'",)),
    ],
)
def test_a_faulty_configuration(answer, opts, words):
    said = answer(*opts)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("error", [AssertionError(), AssertionError([])])
def test_an_assertion_without_a_sentence_is_told_by_its_source(error):
    try:
        raise error
    except AssertionError as caught:
        assert reason_of(caught) == "raise error"


def test_a_missing_or_faulty_configuration_file(answer, tmp_path):
    assert "configs/nothing.yaml" in answer(config_file="configs/nothing.yaml")
    assert "--config-file is missing" in answer(config_file="")
    (tmp_path / "a.yaml").write_text("MODEL: [1,\n")
    assert "a.yaml cannot be used" in answer(config_file=tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("MODEL: {WIDTH: 3}\n")
    said = answer(config_file=tmp_path / "b.yaml")
    assert "b.yaml cannot be used: Non-existent config key: MODEL.WIDTH." in said


def test_no_code_is_executed_from_a_configuration_file(answer, tmp_path):
    mark = tmp_path / "executed"
    code = f"SEED: !!python/object/apply:os.mkdir ['{mark}']\n"
    (tmp_path / "a.yaml").write_text(code)
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\n")
    for name in ("a.yaml", "b.yaml"):
        said = answer(config_file=tmp_path / name)
        assert "python/object/apply:os.mkdir" in said and not mark.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "must be a mapping of keys, got NoneType"),
        ("- 1\n", "must be a mapping of keys, got list"),
        ("_BASE_: faulty.yaml\n", "faulty.yaml is its own _BASE_"),
        ("_BASE_: http://127.0.0.1:9/a.yaml\n", "is an address: download the file"),
    ],
)
def test_a_configuration_file_of_another_form(answer, tmp_path, content, sentence):
    (tmp_path / "faulty.yaml").write_text(content)
    assert sentence in answer(config_file=tmp_path / "faulty.yaml")


def test_more_gpus_than_there_are(answer):
    available = torch.cuda.device_count()
    said = answer(flags=["--num-gpus", str(available + 2)])
    assert said.startswith(f"--num-gpus is {available + 2}, but this machine has {available} GPUs")
    assert f"use --num-gpus {available}" in said


def test_an_output_folder_that_cannot_be_made(answer, tmp_path):
    (tmp_path / "run").touch()
    assert str(tmp_path / "run") in answer()


def test_an_error_in_a_process_that_was_launched_is_said_as_well(answer, train_net, monkeypatch):
    text = "-- Process 1 terminated:\nTraceback ...\ndn_detr.errors.InputError: it is at fault.\n"

    def launch(*_, **__):
        raise torch.multiprocessing.ProcessRaisedException(text, 1, 100)

    monkeypatch.setattr(train_net.launch, "launch", launch)
    assert answer() == "it is at fault."


# ----------------------------------------------------------------------------------- checkpoints


def test_weights_that_cannot_be_downloaded(answer, monkeypatch):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("iopath.common.file_io.download", no_network)
    said = answer("MODEL.WEIGHTS", "https://example.org/model.pth")
    assert "https://example.org/model.pth" in said and "no network" in said
    assert "copy the file to this machine" in said


def test_an_evaluation_without_weights(answer):
    """Random weights were evaluated, with exit status 0."""
    for flags in (["--eval-only"], ["--eval-only", "--resume"]):  # there is none to resume
        assert "--eval-only needs the weights of a detector" in answer(flags=flags)


def test_a_checkpoint_of_another_architecture(answer, run, tmp_path):
    run("MODEL.DN_DETR.DECODER_LAYERS", 1)
    said = answer("MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth", output="other")
    assert "checkpoint of another model" in said and "lacks" in said and "layers.1" in said


# ------------------------------------------------------------------------- in a process of its own


def start(*arguments, package: Path = Path(dn_detr.__file__).parent):
    """train_net.py as a user starts it, with the package at another place."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    return subprocess.run(
        [sys.executable, root / "train_net.py", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_sentence_goes_to_stderr_and_the_exit_status_is_one(arguments):
    done = start(*arguments("MODEL.DN_DETR.NUM_CLASSES", 3))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "NUM_CLASSES" in line]
    assert line.startswith("train_net.py: ")
    assert "Traceback" not in done.stdout + done.stderr


def test_operators_that_were_built_for_another_torch(tmp_path, arguments):
    source, package = Path(dn_detr.__file__).parent, tmp_path / "dn_detr"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    (package / "_C.abi3.so").touch()
    record = {"torch": "1.13.1", "cuda": None}
    (package / "_build.json").write_text(json.dumps(record))
    done = start(*arguments(), package=package)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "built for torch 1.13.1" in line and torch.__version__ in line and "rebuild" in line
