"""Checkpoints are read without running anything that stands in them."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from dn_detr.conversion.safe_load import as_parameters, read_parameters

WEIGHT = torch.arange(6.0).reshape(2, 3)


HTML = b"<!DOCTYPE html><html>404: Not Found</html>"


class Bomb:
    """Writes a file as soon as an unpickler runs what it asks for."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class Settings(argparse.Namespace):
    """A class that the reader has never heard of."""


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_command_line_in_the_file_does_not_stop_the_reading(tmp_path, is_zip):
    """The authors' files hold the arguments of their training, which torch >= 2.6 refuses."""
    path = tmp_path / "checkpoint.pth"
    content = {"model": {"a.weight": WEIGHT}, "args": argparse.Namespace(lr=1e-4, lists=[1, "b"])}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    state = read_parameters(path)
    assert list(state) == ["a.weight"]
    assert torch.equal(state["a.weight"], WEIGHT)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path, is_zip):
    path = tmp_path / "checkpoint.pth"
    torch.save({"a": WEIGHT, "b": WEIGHT[0]}, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for length in range(0, len(whole), 1 if len(whole) < 1000 else 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="the file is damaged or was not written"):
            read_parameters(path)


def test_unknown_classes_are_replaced(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"a": WEIGHT}, "args": Settings(depth=[Settings()])}, path)
    assert torch.equal(read_parameters(path)["a"], WEIGHT)


def test_nothing_that_stands_in_the_file_is_executed(tmp_path):
    path, trace = tmp_path / "checkpoint.pth", tmp_path / "exploded"
    torch.save({"model": {"a": WEIGHT}, "args": Bomb(trace)}, path)
    assert torch.equal(read_parameters(path)["a"], WEIGHT)
    assert not trace.exists()


def test_arrays_of_detectron2s_model_zoo_are_read_without_executing_anything(tmp_path):
    path, trace = tmp_path / "model_final.pkl", tmp_path / "exploded"
    arrays = {"a.weight": WEIGHT.numpy(), "count": np.array(3), "scale": np.float32(2)}
    for content in (
        {"model": arrays, "__author__": "someone", "bomb": Bomb(trace), "names": [Settings()]},
        {**arrays, "bomb": Bomb(trace)},
    ):
        path.write_bytes(pickle.dumps(content))
        state = read_parameters(path)
        assert list(state) == ["a.weight"]
        assert torch.equal(state["a.weight"], WEIGHT)
        assert not trace.exists()
    path.write_bytes(HTML)
    with pytest.raises(ValueError, match=r"not a pickle file: .*[^.]$"):  # callers add a full stop
        read_parameters(path)


def test_names_of_distributed_training_lose_their_prefix(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {"module.a": WEIGHT, "step": 7}}, path)
    assert list(read_parameters(path)) == ["a"]


def test_safetensors_are_read_by_their_specification(tmp_path):
    path = tmp_path / "model.safetensors"
    half = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    raw = WEIGHT.numpy().tobytes() + half.view(torch.int16).numpy().tobytes()
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
        }
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw)
    state = read_parameters(path)
    assert torch.equal(state["a"], WEIGHT) and torch.equal(state["b"], half)


def test_a_damaged_safetensors_file_is_refused(tmp_path):
    """A file that was cut off ended in a RuntimeError of torch.frombuffer or of reshape."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    safetensors.save_file({"a": WEIGHT, "b": WEIGHT.clone()}, path)
    whole = path.read_bytes()
    start = len(whole) - 2 * WEIGHT.nbytes
    path.write_bytes(whole[:8] + whole[8:].replace(b"[2,3]", b"[2,4]"))
    with pytest.raises(ValueError, match="the file is damaged: it does not hold all of a"):
        read_parameters(path)
    for length, sentence in (
        (len(whole) - 1, "the file is damaged: it does not hold all of b"),
        (start + WEIGHT.nbytes, "the file is damaged: it does not hold all of b"),
        (start - 20, "the file is damaged: it ends inside its header"),
        (8, "the file is no safetensors file"),
        (0, "the file is no safetensors file"),
    ):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=sentence):
            read_parameters(path)


def header_of(dtype="F32", shape=(2,), data_offsets=(0, 8)) -> str:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}})


@pytest.mark.parametrize(
    "header",
    [
        *("{1: 2}", "{}1", '{"a": 1}', '{"a": []}', '{"a": {"dtype": "F32"}}'),
        *('{"a":' * 100_000, header_of(data_offsets=[0]), header_of(data_offsets=["x", 8])),
        header_of(shape=[2**70, 0], data_offsets=[0, 0]),
        *(header_of(shape="x"), header_of(shape=[-1, -2]), header_of(shape=[float("inf")])),
    ],
)
def test_a_safetensors_header_that_makes_no_sense_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(ValueError, match="the file is damaged: its header cannot be read"):
        read_parameters(path)


def test_a_web_method_named_safetensors_is_no_safetensors_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(HTML)
    with pytest.raises(ValueError, match="the file is no safetensors file"):
        read_parameters(tmp_path / "model.safetensors")


LOOP: dict = {}
LOOP["model"] = LOOP


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({0: WEIGHT}, "its names must be strings, got 0"),
        ({"a": WEIGHT.to("meta")}, "a must be a dense tensor, got a meta one"),
        ({"a": WEIGHT.to_sparse()}, "a must be a dense tensor, got a sparse one"),
        (
            {"a": torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)},
            "a must be a dense tensor, got a quantized one",
        ),
        ({"a": torch.nested.nested_tensor([WEIGHT])}, "a must be a dense tensor, got a nested one"),
        ({"a": torch.zeros(1).expand(2**40)}, "a must be a dense tensor, got an expanded one"),
        ({"module.a": WEIGHT, "a": WEIGHT + 1}, "a and module.a have different values"),
        ({"a": WEIGHT, "module.a": WEIGHT.double()}, "a and module.a have different values"),
    ],
)
def test_what_is_no_dense_tensor_by_name_is_refused(tmp_path, content, sentence):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=sentence):
        read_parameters(path)


@pytest.mark.parametrize(
    "values", [["x"], [None], np.zeros(1, np.longdouble), np.zeros(1, "M8[s]"), np.zeros(1, ">i4")]
)
def test_arrays_of_no_numbers_are_refused(tmp_path, values):
    array = np.array(values)
    with pytest.raises(ValueError, match="a must be an array of numbers, got"):
        as_parameters({"a": array})
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": array}))
    with pytest.raises(ValueError, match="no parameters"):
        read_parameters(tmp_path / "a.pkl")


def test_arrays_of_another_byte_order_are_read(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": WEIGHT.numpy().astype(">f4")}))
    assert torch.equal(read_parameters(tmp_path / "a.pkl")["a"], WEIGHT)


def test_a_pickle_of_dicts_in_each_other_is_read_in_its_own_size(tmp_path):
    """A copy of each occurrence would be one of 2**40, or of infinitely many."""
    content = {}
    for _ in range(40):
        content = {"a": content, "b": content}
    for nested in (content, LOOP):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(nested))
        with pytest.raises(ValueError, match="no parameters"):
            read_parameters(tmp_path / "a.pkl")


X = b"X\x01\x00\x00\x00x"
BOMBS = {
    "a key of tuples from the memo": b"}"
    + X
    + b"\x85q\x00"
    + b"".join(bytes((104, i, 104, i, 0x86, 113, i + 1)) for i in range(40))
    + b"K\x01s.",
    "a key of doubled tuples": b"}" + X + b"\x85" + b"2\x86" * 40 + b"K\x01s.",
    "an array of 8 GB": b"}" + X + b"cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85Rs.",
}


def test_small_pickles_need_neither_hours_nor_gigabytes(tmp_path):
    """In a process of its own, which fails after a minute of processor time or at 6 GB."""
    for i, bomb in enumerate(BOMBS.values()):
        data = b"\x80\x02" + bomb
        (tmp_path / f"{i}.pkl").write_bytes(data)
        with zipfile.ZipFile(tmp_path / f"{i}.pth", "w") as archive:
            archive.writestr("a/data.pkl", data)
            archive.writestr("a/version", "3\n")
            archive.writestr("a/byteorder", "little")
        legacy = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        data = b"".join(pickle.dumps(value, 2) for value in legacy) + data + pickle.dumps([], 2)
        (tmp_path / f"{i}.bin").write_bytes(data)
    program = """
import resource, sys
from dn_detr.conversion.safe_load import read_parameters
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for path in sys.argv[1:]:
    try:
        read_parameters(path)
    except ValueError as error:
        print(error, repr(error.__context__))
"""
    paths = sorted(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, timeout=300
    )
    sentences = done.stdout.splitlines()
    assert done.returncode == 0 and len(sentences) == 3 * len(BOMBS), done.stderr
    assert all("would need too much time or memory" in sentence for sentence in sentences)


def test_tensors_of_a_safetensors_file_do_not_share_their_data(tmp_path):
    """Five thousand of one megabyte each, in a file of one megabyte."""
    entry = {"dtype": "F32", "shape": [2**18], "data_offsets": [0, 2**20]}
    header = json.dumps({str(i): entry for i in range(5000)}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2**20))
    with pytest.raises(ValueError, match="the file is damaged: its header cannot be read"):
        read_parameters(path)


def test_one_parameter_under_two_names_of_distributed_training_is_read(tmp_path):
    torch.save({"module.a": WEIGHT, "a": WEIGHT}, tmp_path / "checkpoint.pth")
    assert list(read_parameters(tmp_path / "checkpoint.pth")) == ["a"]


def test_a_file_without_parameters_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {}, "epoch": 3}, path)
    with pytest.raises(ValueError, match="no parameters"):
        read_parameters(path)
