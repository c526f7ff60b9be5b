"""The program for exported files says in one sentence what it cannot use."""

import runpy
import sys
from pathlib import Path

import pytest

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "run_exported.py")


@pytest.fixture
def answer(monkeypatch):
    """What it says before it ends."""

    def answer(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(TOOL, run_name="__main__")
        return caught.value.code

    return answer


def identity(path, **metadata):
    """A file of ONNX that gives back what it gets."""
    onnx = pytest.importorskip("onnx")
    kind = onnx.helper.make_tensor_value_info
    names = [kind(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "identity", names[:1], names[1:]
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


def test_files_that_are_no_exported_detectors(answer, tmp_path):
    pytest.importorskip("onnxruntime")
    said = answer(tmp_path / "a.onnx", tmp_path)
    assert said == f"run_exported.py: there is no file {tmp_path / 'a.onnx'}."
    (tmp_path / "a.onnx").write_text("no graph")
    assert "is not a file that onnxruntime can run." in answer(tmp_path / "a.onnx", tmp_path)
    identity(tmp_path / "a.onnx")
    assert "was not made by `dn-detr export`" in answer(tmp_path / "a.onnx", tmp_path)


def test_files_that_are_no_images(answer, tmp_path):
    pytest.importorskip("onnxruntime")
    identity(tmp_path / "a.onnx", dn_detr="{}")
    assert "no images in" in answer(tmp_path / "a.onnx", tmp_path)
    (tmp_path / "b.png").write_text("no picture")
    (tmp_path / "c.png").write_text("no picture either")
    first, second = answer(tmp_path / "a.onnx", tmp_path).splitlines()  # after all others
    assert f"the image '{tmp_path / 'b.png'}' cannot be read" in first and "c.png" in second
    assert "d.png' does not exist." in answer(tmp_path / "a.onnx", tmp_path / "d.png")
