"""Assignments: the optimum of every problem, as SciPy and brute force find it."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from dn_detr.losses.linear_assignment import solve, solve_pytorch
from dn_detr.ops.extension import KERNELS

pytestmark = pytest.mark.usefixtures("operators")


def image_numbers(counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def problems_of(cost, counts, is_empty, num_groups, matches_per_object):
    """(place, matrix, slots) of each problem: its rows are objects, repeated, its columns slots."""
    width = cost.shape[2] // num_groups
    starts = np.cumsum([0, *counts])
    for layer, image, group in itertools.product(
        range(cost.shape[0]), range(len(counts)), range(num_groups)
    ):
        slots = [
            slot
            for slot in range(group * width, (group + 1) * width)
            if is_empty is None or not is_empty[image, slot]
        ]
        rows = cost[layer, starts[image] : starts[image + 1]].double().numpy()
        yield (layer, image), np.tile(rows[:, slots], (matches_per_object, 1)), slots


def check_optimum(cost, counts, is_empty, num_groups, matches_per_object, object_of):
    """Every object stands in as many slots as it can, and the total is the least; returns how many
    problems that were."""
    checked = 0
    for (layer, image), matrix, slots in problems_of(
        cost, counts, is_empty, num_groups, matches_per_object
    ):
        found = object_of[layer, image, slots].numpy()
        used = np.flatnonzero(found >= 0)
        assert used.size == min(matrix.shape)
        assert np.bincount(found[used], minlength=1).max(initial=0) <= matches_per_object
        best = matrix[linear_sum_assignment(matrix)].sum()
        scale = np.abs(matrix).max(initial=0) * max(used.size, 1)
        assert matrix[found[used], used].sum() == pytest.approx(best, rel=0, abs=1e-13 * scale)
        checked += 1
    return checked


def random_costs(generator, kind, shape):
    values = generator.normal(size=shape)
    kinds = {
        "normal": values,
        "ties": generator.integers(-2, 3, size=shape),
        "equal": np.ones(shape),
        "huge": values * 1e30,
        "tiny and negative": -np.abs(values) * 1e-30,
        "competing": generator.normal(size=(shape[0], 1, shape[2])) + 1e-3 * values,
        "one direction": np.arange(shape[2]) * np.arange(1, shape[1] + 1)[:, None] + 0 * values,
    }
    return torch.tensor(np.asarray(kinds[kind], dtype=np.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind", ["normal", "ties", "equal", "huge", "tiny and negative", "competing", "one direction"]
)
def test_the_total_cost_is_that_of_scipy(kind, dtype):
    generator = np.random.default_rng(7)
    checked = 0
    for _ in range(12):
        counts = generator.choice([0, 1, 2, 3, 8, 20], size=4).tolist()
        num_groups, matches_per_object = (
            int(generator.integers(1, 4)),
            int(generator.choice([1, 1, 2, 5])),
        )
        slots = num_groups * int(generator.choice([1, 2, 7, 16, 33, 60]))
        cost = random_costs(generator, kind, (2, sum(counts), slots)).to(dtype)
        share = generator.choice([0.0, 0.2, 0.8, 1.0])
        is_empty = torch.tensor(generator.random((4, slots)) < share) if share else None
        (object_of,), (is_bad,) = solve(
            [cost], image_numbers(counts), 4, [is_empty], [num_groups], [matches_per_object]
        )
        assert not is_bad.any()
        assert is_empty is None or (object_of[:, is_empty] == -1).all()
        checked += check_optimum(cost, counts, is_empty, num_groups, matches_per_object, object_of)
    assert checked > 150  # for each of 2 x 7 cases


def test_tiny_problems_have_the_optimum_of_all_arrangements():
    generator = torch.Generator().manual_seed(3)
    for objects, slots in itertools.product(range(1, 5), repeat=2):
        cost = torch.randn(20, objects, slots, generator=generator, dtype=torch.float64)
        (object_of,), _ = solve([cost], image_numbers([objects]), 1, [None], [1], [1])
        for matrix, found in zip(cost.tolist(), object_of[:, 0].tolist(), strict=True):
            pairs = [(j, slot) for slot, j in enumerate(found) if j >= 0]
            if objects <= slots:
                all_pairs = [enumerate(p) for p in itertools.permutations(range(slots), objects)]
            else:
                all_pairs = [
                    [(j, slot) for slot, j in enumerate(p)]
                    for p in itertools.permutations(range(objects), slots)
                ]
            best = min(sum(matrix[j][slot] for j, slot in p) for p in all_pairs)
            assert sum(matrix[j][slot] for j, slot in pairs) == pytest.approx(best, abs=1e-12)


def test_the_object_stays_out_whose_absence_costs_least():
    # Three objects, two slots: 1 + 2 (objects 0 and 2) is the least total of all pairs.
    cost = torch.tensor([[[1.0, 5.0], [4.0, 4.0], [3.0, 2.0]]])
    assert solve([cost], image_numbers([3]), 1, [None], [1], [1])[0][0].tolist() == [[[0, 2]]]


def test_segments_of_different_layers_and_slots_are_solved_together():
    generator = torch.Generator().manual_seed(0)
    counts = [3, 0, 5]
    shapes = {(4, 30): (3, 2, 0.5), (1, 400): (1, 1, 0.9), (2, 5): (1, 1, 0.0)}
    costs = [torch.rand(layers, 8, slots, generator=generator) for layers, slots in shapes]
    empty = [
        torch.rand(3, slots, generator=generator) < share if share else None
        for (_, slots), (_, _, share) in shapes.items()
    ]
    groups, matches_per_object, _ = zip(*shapes.values(), strict=True)
    object_of, _ = solve(
        costs, image_numbers(counts), 3, empty, list(groups), list(matches_per_object)
    )
    for arguments in zip(
        costs, [counts] * 3, empty, groups, matches_per_object, object_of, strict=True
    ):
        assert check_optimum(*arguments) == arguments[0].shape[0] * 3 * arguments[3]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("counts", [(2, 3), (2, 9)])
def test_costs_that_are_not_finite_end_their_own_group_and_are_named(value, counts):
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(2, sum(counts), 8, generator=generator)
    arguments = (image_numbers(counts), 2, [None], [2], [1])
    (expected,), _ = solve([cost.clone()], *arguments)
    cost[1, 3, 5] = value  # layer 1, image 1, its object 1, group 1
    (object_of,), (is_bad,) = solve([cost], *arguments)
    assert is_bad.tolist() == [[False, False], [False, True]]
    expected[1, 1, 4:] = -1
    assert torch.equal(object_of, expected)


def test_whatever_stands_at_empty_slots_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(2, 9, 12, generator=generator)
    is_empty = torch.rand(2, 12, generator=generator) < 0.5
    arguments = (image_numbers([2, 7]), 2, [is_empty], [1], [1])
    (expected,), _ = solve([cost.clone()], *arguments)
    cost[:, :2, is_empty[0]] = torch.nan
    cost[:, 2:, is_empty[1]] = -torch.inf
    (object_of,), (is_bad,) = solve([cost], *arguments)
    assert torch.equal(object_of, expected) and not is_bad.any()


def test_no_segment_no_layer_no_slot_and_no_object_are_no_problem():
    assert solve([], image_numbers([1]), 1, [], [], []) == ([], [])
    for layers, counts, slots in ((0, [2, 1], 4), (2, [0, 0], 4), (2, [2, 1], 0)):
        cost = torch.zeros(layers, sum(counts), slots)
        (object_of,), (is_bad,) = solve([cost], image_numbers(counts), 2, [None], [1], [1])
        assert object_of.shape == (layers, 2, slots) and (object_of == -1).all()
        assert is_bad.shape == (layers, 2) and not is_bad.any()


def test_many_threads_find_what_one_finds():
    cost = torch.randint(4, (6, 40, 30), generator=torch.Generator().manual_seed(0)).float()
    arguments = ([cost], image_numbers([10] * 4), 4, [None], [1], [2])
    threads, results = torch.get_num_threads(), []
    for number in (1, 4):
        torch.set_num_threads(number)
        results.append(solve(*arguments)[0][0])
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.skipif("cuda" not in KERNELS.get("assign_objects", ()), reason="no CUDA kernels")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["normal", "ties", "competing", "huge"])
@pytest.mark.parametrize("slots", [1, 40, 900, 3000])
def test_a_gpu_finds_what_the_cpu_finds(kind, slots, operators):
    generator = np.random.default_rng(slots)
    counts = [7, 0, 1, 20, 50]
    for matches_per_object, share in ((1, 0.0), (3, 0.5)):
        cost = random_costs(generator, kind, (6, 78, slots)).float()
        cost[1, 8, 0] = torch.nan
        is_empty = torch.from_numpy(generator.random((5, slots)) < share) if share else None
        arguments = ([cost], image_numbers(counts), 5, [is_empty], [1], [matches_per_object])
        on_gpu = (
            [cost.cuda()], arguments[1].cuda(), 5,
            [None if is_empty is None else is_empty.cuda()], [1], [matches_per_object],
        )  # fmt: skip
        expected, found = solve(*arguments), solve(*on_gpu)
        assert torch.equal(found[1][0].cpu(), expected[1][0])
        if operators == "compiled":  # the same algorithm: ties, too, are answered alike
            assert torch.equal(found[0][0].cpu(), expected[0][0])


@pytest.mark.skipif("cuda" not in KERNELS.get("assign_objects", ()), reason="no CUDA kernels")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_can_hold_the_matcher(operators):
    if operators == "plain":
        pytest.skip("SciPy works on the host")
    cost = torch.rand(6, 20, 300, device="cuda")
    image_of = image_numbers([7, 13]).cuda()
    solve([cost], image_of, 2, [None], [1], [1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (object_of,), _ = solve([cost], image_of, 2, [None], [1], [1])
    cost.uniform_()
    graph.replay()
    (expected,), _ = solve_pytorch([cost], image_of, 2, [None], [1], [1])
    assert torch.equal(object_of, expected)
