"""Epochs, the learning rate of a batch, and the recipe that looks at the data."""

from dataclasses import replace

import pytest

from dn_detr.cli.main import main
from dn_detr.d2.config.defaults import read_config
from dn_detr.d2.config.recipe import DataStatistics, recipe, statistics
from dn_detr.d2.solver.length import scale_learning_rate, use_epochs
from dn_detr.errors import InputError


def test_epochs_set_every_count_as_a_fraction_of_the_length(tiny_config):
    """Ten images in batches of two: five iterations an epoch."""
    cfg = tiny_config()
    written = {
        **{"SOLVER.MAX_ITER": 1000, "SOLVER.STEPS": (800,), "SOLVER.WARMUP_ITERS": 50},
        **{"SOLVER.EMA.WARMUP": 200, "SOLVER.CHECKPOINT_PERIOD": 100, "TEST.EVAL_PERIOD": 500},
        **{"INPUT.SCHEDULE": [100, 500, 900], "SOLVER.EPOCHS": 40.0},
    }
    cfg.merge_from_list([x for pair in written.items() for x in pair])
    (sentence,) = use_epochs(cfg)
    assert "40 epochs of 10 images in batches of 2: 200 iterations" in sentence
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (200, (160,), 10)
    assert (solver.EMA.WARMUP, solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (40, 20, 100)
    assert cfg.INPUT.SCHEDULE == [20, 100, 180]
    before = cfg.dump()
    use_epochs(cfg)  # as when config.yaml of the run is trained again
    assert cfg.dump() == before


def test_explicit_counts_stay_and_periods_never_become_zero(tiny_config):
    cfg = tiny_config("SOLVER.EPOCHS", 1, "SOLVER.MAX_ITER", 10**6, "TEST.EVAL_PERIOD", 3)
    use_epochs(cfg, {"SOLVER.EPOCHS", "TEST.EVAL_PERIOD"})
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD) == (5, 3, 1)
    cfg.TEST.EVAL_PERIOD = 0  # only at the end, which stays so
    cfg.SOLVER.EPOCHS = 2.0
    use_epochs(cfg)
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD) == (10, 0)


def test_iterations_exclude_epochs(tiny_config):
    cfg = tiny_config("SOLVER.EPOCHS", 3)
    with pytest.raises(InputError, match="either SOLVER.EPOCHS .* or SOLVER.MAX_ITER, not both"):
        use_epochs(cfg, {"SOLVER.EPOCHS", "SOLVER.MAX_ITER"})
    assert use_epochs(cfg, {"SOLVER.MAX_ITER"}) == []  # EPOCHS of a file gives way
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.MAX_ITER) == (0, 3)


def test_no_epochs_are_refused_instead_of_training_in_full(tiny_config):
    cfg = tiny_config("SOLVER.EPOCHS", 0)
    with pytest.raises(InputError, match=r"SOLVER.EPOCHS \(--epochs\) must be above 0, got 0"):
        use_epochs(cfg, {"SOLVER.EPOCHS"})
    assert use_epochs(cfg) == use_epochs(cfg, {"SOLVER.EPOCHS", "SOLVER.MAX_ITER"}) == []


@pytest.mark.parametrize(("optimizer", "factor"), [("ADAMW", 0.5), ("SGD", 0.25)])
def test_the_learning_rate_follows_the_batch(optimizer, factor):
    written = read_config("dn_deformable", ["SOLVER.OPTIMIZER", optimizer])
    cfg = read_config("dn_deformable", ["SOLVER.OPTIMIZER", optimizer])
    assert scale_learning_rate(cfg, written) == []
    cfg.SOLVER.IMS_PER_BATCH = 4  # of 16
    assert scale_learning_rate(cfg, written, {"SOLVER.BASE_LR"}) == []
    (sentence,) = scale_learning_rate(cfg, written)
    assert pytest.approx(factor * 1e-4) == cfg.SOLVER.BASE_LR
    assert "learning rate" in sentence and "the batch, 4 instead of 16" in sentence


# ----------------------------------------------------------------------------------------- recipe

CELLS = DataStatistics(
    num_images=300,
    num_classes=3,
    most_objects=30,
    shorter_side=480,
    aspect_ratio=1.33,
    small_object=36,
)


def chosen(data: DataStatistics, **more) -> dict:
    options = {"batch": 16, "size": 800, "is_trained": False, **more}
    return {setting.key.rpartition(".")[2]: setting.value for setting in recipe(data, **options)}


def test_a_recipe_follows_from_the_data():
    found = chosen(CELLS)
    assert found["MIN_SIZE_TEST"] == 480 and found["MAX_SIZE_TEST"] == 640
    assert max(found["MIN_SIZE_TRAIN"]) == 480 and all(s % 32 == 0 for s in found["MIN_SIZE_TRAIN"])
    assert found["NUM_QUERIES"] == 100 and found["MAX_OBJECTS"] == 150
    assert found["IMS_PER_BATCH"] == 4 and found["EPOCHS"] == 100
    assert chosen(replace(CELLS, small_object=10))["MIN_SIZE_TEST"] == 800  # enlarged, as allowed
    assert chosen(replace(CELLS, small_object=10), size=640)["MIN_SIZE_TEST"] == 640
    assert chosen(replace(CELLS, small_object=0, most_objects=0))["NUM_QUERIES"] == 100
    crowded = chosen(replace(CELLS, most_objects=400))
    assert crowded["NUM_QUERIES"] == 600 and crowded["MAX_OBJECTS"] == 500
    large = chosen(replace(CELLS, num_images=118_000))
    assert large["EPOCHS"] == 12 and large["IMS_PER_BATCH"] == 16
    assert chosen(CELLS, batch=2)["IMS_PER_BATCH"] == 2
    trained = chosen(CELLS, is_trained=True)
    assert trained["EPOCHS"] == 50 and "NUM_QUERIES" not in trained


def test_statistics_are_those_of_the_images(tiny_config):
    data = statistics(tiny_config())
    assert (data.num_images, data.num_classes) == (10, 6)
    assert 1 <= data.most_objects < 12 and 5 < data.small_object < data.shorter_side < 400


def test_a_training_says_what_was_derived_and_keeps_explicit_keys(arguments, tmp_path, capsys):
    """The report on the data is last before the first iteration; files hold what is long."""
    command = arguments("SOLVER.IMS_PER_BATCH", 1, "SOLVER.BASE_LR", 1e-3)
    opts = command[command.index("OUTPUT_DIR") :]
    drop = ("SOLVER.MAX_ITER", "INPUT.MIN_SIZE_TEST")
    opts = [x for k, v in zip(opts[::2], opts[1::2], strict=True) if k not in drop for x in (k, v)]
    main(["train", command[1], *opts, "--num-gpus", "0", "--epochs", "0.2", "--recipe", "auto"])
    printed = capsys.readouterr().out
    assert "recipe: INPUT.MIN_SIZE_TEST" in printed and "recipe: SOLVER.IMS" not in printed
    assert "0.2 epochs of 10 images in batches of 1: 2 iterations" in printed
    report, first = printed.index("images     10"), printed.index("iter 1/2")
    assert report < first
    between = printed[report:first].splitlines()
    assert sum("INFO" in line for line in between) <= 4  # the other dataset, and the start
    log = (tmp_path / "run/log.txt").read_text()
    for long in ("Running with full config", "Model:\nDenoisingDETR"):
        assert long in log and long not in printed
    assert "\x1b" not in log
    weights = tmp_path / "run/model_final.pth"
    assert f"the last weights: {weights}; next:\n  dn-detr predict PICTURES" in printed
    main(["train", "--resume", "--output", str(tmp_path / "run"), "--num-gpus", "0"])
    assert "is the end: raise SOLVER.MAX_ITER to go on" in capsys.readouterr().out
    main(["train", "--resume", "--output", str(tmp_path / "run"), "--num-gpus", "0", "--epochs=.4"])
    printed = capsys.readouterr().out
    assert "0.4 epochs of 10 images in batches of 1: 4 iterations" in printed
    assert "iter 3/4" in printed and "iter 2/4" not in printed
