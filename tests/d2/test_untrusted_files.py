"""Files of strangers: nothing in them is executed or fetched, they cannot say where to write, and
damage is one sentence."""

from __future__ import annotations

import pickle
import time
import urllib.request
import zipfile

import numpy as np
import pytest
import torch

from dn_detr import Detector
from dn_detr.conversion.safe_load import read_parameters
from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.inference.saved_detector import read_evaluation_config
from dn_detr.datasets.yolo import read_class_names
from dn_detr.errors import InputError

EXECUTE = "!!python/object/apply:os.system ['touch {trace}']"
NEW = "!!python/object/new:tuple [[1]]"
ALIASES = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
YAML = {
    "execute": "SEED: " + EXECUTE,
    "object": "SEED: " + NEW,
    "aliases": ALIASES,
    "levels": "SEED: " + "[" * 3000 + "]" * 3000,
    "date": "SEED: 2024-99-99",
    "key": "? [a, {{b: c}}]\n: 1",
    "address": "_BASE_: http://127.0.0.1:9/a.yaml",
    "itself": "_BASE_: {path}",
    "empty": "",
    "list": "[1, 2]",
    "binary": "\x00\x01",
}


class Execute:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def nothing_is_fetched(monkeypatch):
    def refuse(*args, **_kwargs):
        raise AssertionError(f"fetched {args}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def checkpoint(trained):
    return torch.load(trained / "model_final.pth", weights_only=True)


def in_time(function, *args, **kwargs):
    """The one sentence of an InputError, given in less than two seconds."""
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert time.process_time() - start < 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("nothing_is_fetched")
@pytest.mark.parametrize("payload", YAML)
def test_a_configuration_file_executes_and_fetches_nothing(tmp_path, payload):
    path, trace = tmp_path / "a.yaml", tmp_path / "trace"
    path.write_text(YAML[payload].format(trace=trace, path=path), encoding="utf-8")
    assert "a.yaml cannot be used" in in_time(read_config, str(path), [])
    assert not trace.exists()


def test_a_tuple_tag_of_python_is_a_tuple(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("DATASETS:\n  TEST: !!python/tuple [a, b]\n", encoding="utf-8")
    assert read_config(str(path), []).DATASETS.TEST == ("a", "b")


@pytest.mark.parametrize("payload", ["execute", "object", "aliases", "levels", "binary"])
def test_class_names_in_yaml_execute_nothing(tmp_path, payload):
    path, trace = tmp_path / "data.yaml", tmp_path / "trace"
    text = YAML[payload].replace("SEED", "names").format(trace=trace)
    path.write_text(text, encoding="utf-8")
    in_time(read_class_names, path)
    assert not trace.exists()


def test_a_byte_order_mark_is_no_part_of_a_class_name(tmp_path):
    for name, text in (("classes.txt", "cat\ndog\n"), ("data.yaml", "names: [cat, dog]\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert read_class_names(tmp_path / name) == ["cat", "dog"]


@pytest.mark.parametrize("payload", ["execute", "object", "aliases", "levels", "list", "binary"])
def test_the_configuration_in_a_checkpoint_executes_nothing(tmp_path, checkpoint, payload):
    trace = tmp_path / "trace"
    checkpoint["detector"]["config"] = YAML[payload].format(trace=trace)
    torch.save(checkpoint, tmp_path / "a.pth")
    sentence = in_time(Detector.from_checkpoint, tmp_path / "a.pth")
    assert "the configuration in" in sentence and not trace.exists()


@pytest.mark.usefixtures("nothing_is_fetched")
def test_a_checkpoint_does_not_say_where_to_write_or_what_to_fetch(tmp_path, checkpoint):
    (tmp_path / "weights").mkdir()
    path = str(tmp_path / "weights" / "a.pth")
    elsewhere = tmp_path / "elsewhere"
    checkpoint["detector"]["config"] += (
        f"OUTPUT_DIR: {elsewhere}\nWANDB: {{ENABLED: true}}\nSEED: 5\n"
    )
    text = checkpoint["detector"]["config"]
    for key, value in (
        ("WEIGHTS", "http://127.0.0.1:9/a.pth"),
        ("BACKBONE_PRETRAINED", "true"),
    ):
        lines = [
            f"{line.partition(key)[0]}{key}: {value}"
            if line.strip().startswith(f"{key}:")
            else line
            for line in text.splitlines()
        ]
        text = "\n".join(lines)
    assert "127.0.0.1" in text and "BACKBONE_PRETRAINED: true" in text
    checkpoint["detector"]["config"] = text
    torch.save(checkpoint, path)
    cfg = read_evaluation_config("", ["MODEL.WEIGHTS", path])
    assert str(tmp_path / "weights") == cfg.OUTPUT_DIR
    assert not cfg.WANDB.ENABLED and not cfg.MODEL.DN_DETR.BACKBONE_PRETRAINED
    assert path == cfg.MODEL.WEIGHTS
    Detector.from_checkpoint(path)
    assert not elsewhere.exists()


@pytest.mark.usefixtures("nothing_is_fetched")
def test_a_backbone_from_a_hub_is_no_name(tmp_path, checkpoint):
    text = checkpoint["detector"]["config"].splitlines()
    for i, line in enumerate(text):
        if line.strip().startswith("BACKBONE: '") or line.strip().startswith('BACKBONE: "'):
            text[i] = f"{line.partition('BACKBONE')[0]}BACKBONE: timm/hf-hub:someone/model"
        if line.strip().startswith("NAME: build_"):
            text[i] = f"{line.partition('NAME')[0]}NAME: build_named_backbone"
    assert any("hf-hub" in line for line in text)
    checkpoint["detector"]["config"] = "\n".join(text)
    torch.save(checkpoint, tmp_path / "a.pth")
    in_time(Detector.from_checkpoint, tmp_path / "a.pth")


@pytest.mark.parametrize("names", [5, [1, 2, 3, 4, 5, 6], "abcdef", {"a": 1}, [["a"]] * 6, None])
def test_class_names_of_a_checkpoint_must_be_strings(tmp_path, checkpoint, names):
    checkpoint["detector"]["class_names"] = names
    torch.save(checkpoint, tmp_path / "a.pth")
    assert "class names" in in_time(Detector.from_checkpoint, tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors", ".bin"])
def test_a_pickle_under_any_name_executes_nothing(tmp_path, suffix):
    path, trace = tmp_path / f"a{suffix}", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"model": {"a": np.ones(2)}, "b": Execute(trace)}))
    for door in (
        Detector.from_checkpoint,
        lambda p: read_evaluation_config("", ["MODEL.WEIGHTS", p]),
    ):
        with pytest.raises(InputError):
            door(str(path))
    assert not trace.exists()


def test_a_compressed_checkpoint_is_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(1000, 1000)}}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as stored,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    assert (tmp_path / "b.pth").stat().st_size < 100_000
    with pytest.raises(ValueError, match="damaged or was not written by torch.save"):
        read_parameters(tmp_path / "b.pth")


def test_an_array_larger_than_its_file_is_not_allocated(tmp_path):
    """A few bytes that name a shape of 8 TB."""

    class Huge:
        def __reduce__(self):
            return np.core.multiarray._reconstruct, (np.ndarray, (10**12,), "d")

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": Huge(), "b": np.ones(2, np.float32)}))
    state = read_parameters(tmp_path / "a.pkl")
    assert state["a"].numel() == 0 and torch.equal(state["b"], torch.ones(2))


def test_every_flip_and_every_cut_of_a_checkpoint_is_one_sentence(tmp_path):
    """At every 64th byte of a small file; what still loads is the same."""
    small = {"model": {"a": torch.arange(64.0), "b": torch.ones(3)}, "detector": {"format": 2}}
    path = tmp_path / "a.pth"
    torch.save(small, path)
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 64):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position // 64 % 8
        for content in (bytes(flipped), whole[:position]):
            path.write_bytes(content)
            try:
                state = read_parameters(path)
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
            else:
                assert set(state) == {"a", "b"}
                assert torch.equal(state["a"], small["model"]["a"])
                assert torch.equal(state["b"], small["model"]["b"])
    assert refused > len(whole) // 64  # all cuts, and flips of what matters
