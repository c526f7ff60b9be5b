"""Which weights a model takes, and what it says of those that it refuses."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from samples import sample
from tiny import tiny_model
from torch import nn

from dn_detr.build import HybridMatching
from dn_detr.d2.engine.checkpoint import FORMAT, Checkpointer, fit_query_rows
from dn_detr.d2.engine.run_checkpoint import RunCheckpointer
from dn_detr.d2.inference.saved_detector import description_in
from dn_detr.errors import InputError


@pytest.fixture
def model_of(tiny_config):
    """A new tiny model with random weights, also where training starts from zero."""

    def model_of(*opts, classes=6, seed=0):
        cfg = tiny_config(*opts)
        cfg.MODEL.DN_DETR.NUM_CLASSES = classes
        torch.manual_seed(seed)
        model = build_model(cfg).eval()
        for name, parameter in model.named_parameters():
            if not name.endswith("learned.content"):  # whose last channel must stay zero
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        return model

    return model_of


PLAIN = ("MODEL.DN_DETR.DENOISING.ENABLED", False)


def save(model, folder, name="weights") -> str:
    Checkpointer(model, str(folder)).save(name)
    return str(folder / f"{name}.pth")


def load(model, path, *, is_for_training=False):
    Checkpointer(model, is_for_training=is_for_training).load(path, checkpointables=[])


def differing(model, path) -> set[str]:
    """Names of the parameters that are not those of the file."""
    saved = torch.load(path)["model"]
    return {
        name
        for name, value in model.state_dict().items()
        if name not in saved or not torch.equal(saved[name], value)
    }


def test_a_crash_while_saving_leaves_the_older_file_as_it_was(model_of, tmp_path, monkeypatch):
    path, model = save(model_of(seed=1), tmp_path), model_of(seed=2)

    def write_half(_data, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(InputError, match="cannot be written .no space left on device.; those bef"):
        RunCheckpointer(model, str(tmp_path)).save("weights")
    load(model, path)
    assert not differing(model, path)
    assert (tmp_path / "last_checkpoint").read_text() == "weights.pth"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "weights.pth"]


def test_a_denoised_checkpoint_gives_the_plain_model_the_same_detections(model_of, tmp_path):
    trained, plain = model_of(seed=1), model_of(*PLAIN, seed=2)
    load(plain, save(trained, tmp_path))
    with torch.no_grad():
        (expected,), (found,) = (model([sample(0, 0)]) for model in (trained, plain))
    torch.testing.assert_close(
        found["instances"].pred_boxes.tensor, expected["instances"].pred_boxes.tensor
    )
    assert torch.equal(found["instances"].scores, expected["instances"].scores)


LEARNED = {
    "conditional_detr": {"position"},
    "deformable_detr": {"position", "content"},
    "dab_deformable": {"content", "box_logits"},
    "dab_detr": {"anchors"},
    "anchor_detr": {"anchors"},
    "dino": {"content"},
    "deformable_detr_two_stage": set(),
    "mask2former": {"position", "content"},
}
"""Method -> its parameters with a row per query; proposals of a two-stage method have none."""


def detector(method, **options):
    return nn.ModuleDict({"core": tiny_model(method, **options)})


def repeated(rows, number):
    return torch.stack([rows[i % len(rows)] for i in range(number)])


@pytest.mark.parametrize("wanted", [5, 23])
@pytest.mark.parametrize("method", LEARNED)
def test_a_training_with_another_number_of_queries_copies_or_cuts_their_rows(method, wanted):
    """It was refused, though the report of the data itself says when queries are too few."""
    trained = detector(method, num_queries=9, seed=1)
    model = detector(method, num_queries=wanted, seed=2)
    state = trained.state_dict()
    said = fit_query_rows(state, model.state_dict())
    model.load_state_dict(state)
    resized = set()
    for name, value in model.state_dict().items():
        rows = trained.state_dict()[name]
        if rows.shape != value.shape:
            assert torch.equal(value, repeated(rows, wanted)), name
            resized.add(name.rpartition(".learned.")[2])
    assert resized == LEARNED[method]
    how = "of which the first stay" if wanted == 5 else "repeated in turn"
    assert said == ([f"9 learned queries became {wanted}, {how}"] if resized else [])


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        ({"num_groups": 3, "num_queries": 4}, {"num_groups": 3, "num_queries": 6}, 4),
        (
            {"hybrid": HybridMatching(num_queries=7)},
            {"hybrid": HybridMatching(num_queries=9)},
            2,
        ),
    ],
)
def test_rows_of_further_groups_and_one_to_many_queries_are_copied_too(old, new, count):
    trained, model = (detector("dab_deformable", **options) for options in (old, new))
    state = trained.state_dict()
    fit_query_rows(state, model.state_dict())
    model.load_state_dict(state)
    names = [n for n in state if "auxiliary" in n and n.endswith(("content", "box_logits"))]
    assert len(names) == count
    for name in names:
        value = model.state_dict()[name]
        assert torch.equal(value, repeated(trained.state_dict()[name], len(value)))


def test_patterns_are_not_copied_or_cut():
    """All anchors share them: a detector without one of them lacks what it had learned to find."""
    states = [detector("anchor_detr", num_patterns=n).state_dict() for n in (3, 2)]
    with pytest.raises(InputError, match="3 patterns.*set MODEL.DN_DETR.NUM_PATTERNS to 3, got 2"):
        fit_query_rows(*states)


def test_more_queries_are_said_in_a_sentence_and_not_taken_for_an_evaluation(
    model_of, tmp_path, caplog
):
    path = save(model_of(seed=1), tmp_path)
    number = torch.load(path)["model"]["core.query_design.learned.content"].shape[0]
    model = model_of("MODEL.DN_DETR.NUM_QUERIES", number + 3, seed=2)
    with caplog.at_level("INFO"):
        load(model, path, is_for_training=True)
    (line,) = [text for text in caplog.messages if text.startswith("Loaded")]
    assert line.endswith(f"; {number} learned queries became {number + 3}, repeated in turn")
    assert "newly initialized" not in line
    rows = model.core.query_design.learned.content
    assert torch.equal(rows[number:], rows[:3])
    with pytest.raises(InputError, match=f"checkpoint of another model: it differs in .*{number}"):
        load(model, path)


def test_denoising_can_start_from_a_plain_checkpoint_and_says_what_is_new(
    model_of, tmp_path, caplog
):
    denoised, path = model_of(seed=2), save(model_of(*PLAIN, seed=1), tmp_path)
    with caplog.at_level("INFO"):
        load(denoised, path, is_for_training=True)
    assert differing(denoised, path) == {"core.query_design.content.label_embedding.weight"}
    (line,) = [text for text in caplog.messages if text.startswith("Loaded")]
    assert "not in the checkpoint" in line and line.endswith("label_embedding.weight")


def test_with_other_classes_heads_and_label_table_start_anew_together(model_of, tmp_path, caplog):
    path, model = save(model_of(classes=6, seed=1), tmp_path), model_of(classes=4, seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level("INFO"):
        load(model, path, is_for_training=True)
    anew = differing(model, path)
    assert {name.split(".")[-2] for name in anew} == {"0", "1", "label_embedding"}
    assert all("class_heads" in name or "label_embedding" in name for name in anew)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in anew)
    (line,) = [text for text in caplog.messages if text.startswith("Loaded")]
    assert "other classes" in line and all(name in line for name in anew)


@pytest.mark.parametrize(("names", "is_new"), [(list("abcdef"), False), (list("bacdef"), True)])
def test_as_many_classes_with_other_names_are_other_classes(model_of, tmp_path, names, is_new):
    detector = {"class_names": list("abcdef")}
    RunCheckpointer(model_of(seed=1), str(tmp_path), detector=detector).save("a")
    model, path = model_of(seed=2), str(tmp_path / "a.pth")
    checkpointer = Checkpointer(model, is_for_training=True, detector={"class_names": names})
    checkpointer.load(path, checkpointables=[])
    anew = differing(model, path)
    assert bool(anew) == is_new
    assert all("class_heads" in name or "label_embedding" in name for name in anew)


def test_other_classes_are_refused_in_evaluation_and_on_resuming(model_of, tmp_path):
    path = save(model_of(classes=6), tmp_path)
    with pytest.raises(InputError, match=r"another model: it differs in .* instead of \(5, 15\)"):
        load(model_of(classes=4), path)
    with pytest.raises(InputError, match="another model"):
        Checkpointer(model_of(classes=4), str(tmp_path), is_for_training=True).resume_or_load("")


def test_a_backbone_alone_starts_a_training_but_is_no_detector(model_of, tmp_path, caplog):
    source, model = model_of(seed=1), model_of(seed=2)
    path = tmp_path / "backbone.pth"
    saved = {k: v for k, v in source.state_dict().items() if k.startswith("backbone.")}
    torch.save(saved, path)
    for names in (saved, {name.removeprefix("backbone."): v for name, v in saved.items()}):
        torch.save(names, path)
        with pytest.raises(InputError, match="holds a backbone alone and no detector"):
            load(model_of(seed=2), str(path))
    load(model, str(path), is_for_training=True)
    assert not [
        r for r in caplog.records if r.levelname == "WARNING"
    ]  # of all the other parameters
    for name, value in model.state_dict().items():
        assert name.startswith("backbone.") == (name in saved)
        assert name not in saved or torch.equal(value, saved[name])


def test_a_classifier_of_detectron2s_model_zoo_fits_the_backbone(model_of, tmp_path):
    source, model = model_of(seed=1), model_of(seed=2)
    weights = {
        name.removeprefix("backbone."): value.numpy()
        for name, value in source.state_dict().items()
        if name.startswith("backbone.")
    }
    weights["fc1000.bias"] = torch.zeros(10).numpy()
    path = tmp_path / "R-18.pkl"
    content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    load(model, str(path), is_for_training=True)
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name


def test_a_detector_without_statistics_of_frozen_norms_is_refused(model_of, tmp_path):
    """Detectron2's frozen batch norm makes up those that are missing, so nothing seemed to be."""
    opts = ("MODEL.RESNETS.NORM", "FrozenBN")
    saved = dict(model_of(*opts).state_dict())  # without the versions of its modules
    del saved["backbone.res2.0.conv1.norm.running_var"]
    torch.save({"model": saved}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"lacks 1 of .* backbone.res2.0.conv1.norm.running_var"):
        load(model_of(*opts), str(tmp_path / "a.pth"), is_for_training=True)


def test_parameters_that_only_training_needs_may_be_surplus(model_of, tmp_path):
    path = save(model_of("MODEL.DN_DETR.NUM_GROUPS", 3, seed=1), tmp_path)
    assert any("auxiliary." in name for name in torch.load(path)["model"])
    load(model_of(*PLAIN, seed=2), path)


def test_a_deeper_detector_is_another_architecture(model_of, tmp_path):
    path = save(model_of("MODEL.DN_DETR.DECODER_LAYERS", 3), tmp_path)
    with pytest.raises(InputError, match="another model: it has also .*layers.2"):
        load(model_of(), path, is_for_training=True)


def test_a_detector_of_integers_is_refused(model_of, tmp_path):
    model = model_of()
    state = model.state_dict()
    state["backbone.stem.conv1.weight"] = state["backbone.stem.conv1.weight"].long()
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.raises(
        InputError, match="type torch.int64 for backbone.stem.conv1.weight, which must be"
    ):
        load(model, str(tmp_path / "a.pth"))


def test_a_foreign_checkpoint_is_refused(model_of, tmp_path):
    for name, sentence in [
        ("weight", "holds none of the parameters of this model's backbone"),
        ("transformer.weight", "of another project, which cannot be read as dab_deformable"),
    ]:
        torch.save({name: torch.zeros(3)}, tmp_path / "a.pth")
        with pytest.raises(InputError, match=sentence):
            load(model_of(), str(tmp_path / "a.pth"), is_for_training=True)


def cut_off(path):
    torch.save({"backbone.stem.conv1.weight": torch.zeros(100, 100)}, path)
    path.write_bytes(path.read_bytes()[:20_000])


LOOP: dict = {}
LOOP["model"] = LOOP


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("a.pth", cut_off, "cannot be loaded as a checkpoint: the file is damaged"),
        ("a.pth", lambda path: path.write_text("no weights"), "cannot be loaded as a checkpoint"),
        ("a.pkl", lambda path: path.write_bytes(b"\x80"), "cannot be loaded as a checkpoint"),
        ("a.pth", lambda path: torch.save([1, 2], path), "must hold arrays by name"),
        ("a.pth", lambda path: torch.save({"model": 3}, path), "must hold arrays by name"),
        (
            "a.pth",
            lambda path: torch.save({0: torch.zeros(3)}, path),
            "names must be strings, got 0",
        ),
        (
            "a.pkl",
            lambda path: path.write_bytes(pickle.dumps({"a": np.array(["x"])})),
            "of numbers",
        ),
        ("a.pkl", lambda path: path.write_bytes(pickle.dumps(LOOP)), "must hold arrays by name"),
        ("a.pth", lambda path: None, "there is no checkpoint"),
    ],
)
def test_files_that_are_no_checkpoints_are_refused_in_one_sentence(
    model_of, tmp_path, name, make, words
):
    make(tmp_path / name)
    with pytest.raises(InputError) as caught:
        load(model_of(), str(tmp_path / name), is_for_training=True)
    assert words in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


@pytest.mark.parametrize("average", [None, {"module": {}}, {"model": None}])
def test_a_moving_average_of_another_project_is_refused_in_one_sentence(
    model_of, tmp_path, average
):
    model = model_of()
    torch.save({"model": model.state_dict(), "ema": average}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="no moving average of the weights|arrays by name"):
        load(model, f"{tmp_path / 'a.pth'}@ema")


def test_what_another_project_keeps_under_the_name_of_the_description_is_ignored(
    model_of, tmp_path
):
    model = model_of()
    torch.save({"model": model.state_dict(), "detector": 3}, tmp_path / "a.pth")
    load(model, str(tmp_path / "a.pth"))


@pytest.mark.parametrize("saved", [None, FORMAT - 1, FORMAT + 1])
def test_parameter_names_of_another_version_are_refused_in_one_sentence(model_of, tmp_path, saved):
    about = {"config": "", "class_names": list("abcdef")}
    model = model_of(seed=1)
    RunCheckpointer(model, str(tmp_path), detector={**about, "format": FORMAT}).save("now")
    load(model, str(tmp_path / "now.pth"))
    other = about if saved is None else {**about, "format": saved}
    RunCheckpointer(model, str(tmp_path), detector=other).save("other")
    path = str(tmp_path / "other.pth")
    for read in (lambda: load(model, path), lambda: description_in(path)):
        with pytest.raises(
            InputError, match=rf"names of format {saved or 1}, .* reads format 2: use"
        ):
            read()
