"""Tiny trainings through train_net.py, in the process of the tests."""

import importlib.util
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from tiny import read_by

from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.data.catalog import prepare
from dn_detr.datasets.shapes import generate

ROOT = Path(__file__).resolve().parents[2]
QUICK = ROOT / "configs" / "quick" / "dn_deformable.yaml"

TINY = """
    MODEL.RESNETS.STEM_OUT_CHANNELS 8  MODEL.RESNETS.RES2_OUT_CHANNELS 8
    MODEL.DN_DETR.CHANNELS 16  MODEL.DN_DETR.NUM_HEADS 2  MODEL.DN_DETR.NUM_QUERIES 12
    MODEL.DN_DETR.FEED_FORWARD_DIM 16  MODEL.DN_DETR.ENCODER_LAYERS 1
    MODEL.DN_DETR.DECODER_LAYERS 2  MODEL.DN_DETR.DENOISING.NUM_GROUPS 2
    INPUT.MIN_SIZE_TRAIN (64,)  INPUT.MAX_SIZE_TRAIN 96  INPUT.MIN_SIZE_TEST 64
    INPUT.MAX_SIZE_TEST 96  TEST.DETECTIONS_PER_IMAGE 10  SOLVER.IMS_PER_BATCH 2
    SOLVER.MAX_ITER 3  SOLVER.STEPS (2,)  SOLVER.WARMUP_ITERS 1  TEST.EVAL_PERIOD 0  LOG_PERIOD 1
""".split()
"""What makes the quick configuration train at tens of iterations a second."""


def program(path: str):
    """A program beside the package as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def train_net():
    """train_net.py as a module."""
    return program("train_net.py")


@pytest.fixture(scope="session")
def tool():
    """tool("name") is tools/name.py as a module."""
    return lambda name: program(f"tools/{name}.py")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Options of the configuration: ten drawn pictures to train on, four to evaluate on."""
    root = tmp_path_factory.mktemp("tiny_data")
    entries = []
    for split, num_images in (("train", 10), ("val", 4)):
        folder = generate(root, split, num_images=num_images, seed=1)
        entries.append([f"tiny_{split}", str(folder / "annotations.json"), str(folder / "images")])
    yield [
        *("DATASETS.COCO_FORMAT", str(entries)),
        *("DATASETS.TRAIN", "('tiny_train',)"),
        *("DATASETS.TEST", "('tiny_val',)"),
    ]
    for name in ("tiny_train", "tiny_val"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def arguments(tmp_path, tiny_data):
    """The command line of a tiny training into tmp_path / "run", with further options."""

    def command_line(*opts, flags=(), config_file=QUICK, output="run") -> list[str]:
        return [
            *("--config-file", str(config_file), "--num-gpus", "0", *flags),
            *(
                "OUTPUT_DIR",
                str(tmp_path / output),
                *read_by(config_file, TINY, opts),
                *tiny_data,
                *map(str, opts),
            ),
        ]

    return command_line


def run_quietly(train_net, command_line: list[str]) -> None:
    """Run train_net.py."""
    train_net.invoke_main(command_line)


@pytest.fixture
def run(train_net, arguments):
    """Run train_net.py with options; see `arguments`."""
    return lambda *opts, **more: run_quietly(train_net, arguments(*opts, **more))


@pytest.fixture
def run_command(train_net):
    """Run train_net.py with a whole command line."""
    return lambda command_line: run_quietly(train_net, command_line)


@pytest.fixture(scope="session")
def train_tiny(train_net, tiny_data):
    """A tiny training into a folder, for fixtures that several tests share; see `arguments`."""

    def train_tiny(folder, *opts, flags=(), config_file=QUICK):
        command_line = ["--config-file", str(config_file), "--num-gpus", "0", *flags]
        options = [
            "OUTPUT_DIR",
            str(folder),
            *read_by(config_file, TINY, opts),
            *tiny_data,
            *map(str, opts),
        ]
        run_quietly(train_net, [*command_line, *options])

    return train_tiny


@pytest.fixture(scope="session")
def trained(train_tiny, tmp_path_factory):
    """The folder of a tiny training of three iterations, which all tests may read."""
    folder = tmp_path_factory.mktemp("trained")
    train_tiny(folder)
    return folder


@pytest.fixture
def tiny_config(train_net, arguments):
    """The configuration of a tiny training, datasets registered, not frozen."""

    def config(*opts, **more):
        args = train_net.argument_parser().parse_args(arguments(*opts, **more))
        cfg = read_config(args.config_file, args.opts)
        cfg.MODEL.DEVICE = "cpu"
        prepare(cfg)
        return cfg

    return config
