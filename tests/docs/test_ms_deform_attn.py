"""The examples of docs/ms_deform_attn.md run and give equal results; they need no Detectron2."""

import pytest
from doc_commands import ROOT, blocks

BASIC, AUTHORS, HUGGING_FACE = blocks(ROOT / "docs" / "ms_deform_attn.md", "python")


def test_the_authors_signature_gives_the_same_result():
    names = {}
    exec(BASIC, names)
    exec(AUTHORS, names)
    assert names["value"].grad.abs().sum() > 0


def test_hugging_faces_module_gives_the_same_result_with_our_operator(monkeypatch):
    name = "transformers.models.deformable_detr.modeling_deformable_detr"
    pytest.importorskip("transformers", reason="compared only where it is installed")
    module = pytest.importorskip(name).MultiScaleDeformableAttention
    monkeypatch.setattr(module, "forward", module.forward)  # restored after the test
    names = {}
    for text in (BASIC, AUTHORS, HUGGING_FACE):
        exec(text, names)
    assert module.forward is names["forward"]
    names["after"].sum().backward()
    gradients = [p.grad for p in names["attention"].parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
