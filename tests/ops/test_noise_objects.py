"""Noised objects: against a slow loop, the same everywhere, and distributed as the papers say."""

import random

import pytest
import torch

from dn_detr.ops import noise_objects, noise_objects_pytorch
from dn_detr.ops.philox import philox

CLASSES = 7


def make_batch(counts=(3, 1, 0, 5), most=None, dtype=torch.float32, device="cpu", seed=0):
    """(labels, boxes, is_object, noise_seeds): objects first, as `pad_targets` makes them."""
    generator = torch.Generator().manual_seed(seed)
    batch, most = len(counts), most or max(counts)
    is_object = torch.arange(most) < torch.tensor(counts)[:, None]
    labels = torch.randint(CLASSES, (batch, most), generator=generator)
    size = torch.rand(batch, most, 2, generator=generator, dtype=dtype) * 0.5 + 0.05
    centre = size / 2 + torch.rand(batch, most, 2, generator=generator, dtype=dtype) * (1 - size)
    boxes = torch.cat((centre, size), dim=-1)
    labels[~is_object], boxes[~is_object] = 0, 0.5
    keys = torch.randint(-(1 << 62), 1 << 62, (batch,), generator=generator)
    return tuple(x.to(device) for x in (labels, boxes, is_object, keys))


def call(function, batch, **changes):
    numbers = {
        "num_groups": 3,
        "slots_per_group": batch[0].shape[-1],
        "num_classes": CLASSES,
        "box_noise": 0.4,
        "label_noise": 0.5,
        "contrastive": False,
        "num_matched": 4,
        "mask_dtype": torch.float32,
        **changes,
    }
    return function(*batch, **numbers)


# ---------------------------------------------------------------------------- definition


def words_of(key, index, stream, draw):
    return [word.item() for word in philox(key.view(1), (index, stream, draw, 0))]


def slow_noise(batch, num_groups, slots, box_noise, label_noise, contrastive):
    """Lists over [image][slot] of (label, box, assignment, is_empty), in Python numbers."""
    result = []
    for label, box, is_object, key in zip(*batch, strict=True):
        count = int(is_object.sum())
        image = []
        for group in range(num_groups):
            chosen = list(range(count))
            if count > slots:
                chosen.sort(key=lambda m: (words_of(key, m, 2 * group, 1)[3], m))
                chosen = chosen[:slots]
            for is_negative in range(2 if contrastive else 1):
                for slot in range(slots):
                    if slot >= len(chosen):
                        image.append((0, [0.5] * 4, -1, True))
                        continue
                    m = chosen[slot]
                    stream = 2 * group + is_negative
                    draws = [(word >> 8) / 2**24 for word in words_of(key, m, stream, 0)]
                    flip, new, signs, _ = words_of(key, m, stream, 1)
                    cx, cy, w, h = box[m].tolist()
                    if contrastive:
                        sides = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                        for i in range(4):
                            reach = draws[i] + is_negative
                            sign = -1 if signs >> i & 1 else 1
                            sides[i] += sign * reach * box_noise * (w, h)[i % 2] / 2
                        x1, y1, x2, y2 = (min(max(side, 0), 1) for side in sides)
                        moved = [(x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, 0), max(y2 - y1, 0)]
                    else:
                        u = [(2 * draw - 1) * box_noise for draw in draws]
                        moved = [cx + u[0] * w / 2, cy + u[1] * h / 2]
                        moved += [w * (1 + u[2]), h * (1 + u[3])]
                        moved = [min(max(x, 0), 1) for x in moved]
                    is_flipped = (flip >> 8) / 2**24 < label_noise
                    noised = new * CLASSES // 2**32 if is_flipped else label[m].item()
                    image.append((noised, moved, -1 if is_negative else m, False))
        result.append(image)
    return result


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("slots", [5, 2, 1])
def test_slots_equal_a_slow_loop(noise, slots, contrastive):
    function, device = noise
    result = call(
        function, make_batch(device=device), slots_per_group=slots, contrastive=contrastive
    )
    expected = slow_noise(make_batch(), 3, slots, 0.4, 0.5, contrastive)
    labels, boxes, assignment, is_empty = (
        [[entry[i] for entry in image] for image in expected] for i in range(4)
    )
    assert result.labels.tolist() == labels
    assert result.assignment.tolist() == assignment
    assert result.is_empty.tolist() == is_empty
    torch.testing.assert_close(result.boxes.cpu(), torch.tensor(boxes), rtol=0, atol=2e-7)


@pytest.mark.parametrize("hide_empty", [True, False])
@pytest.mark.parametrize("contrastive", [False, True])
def test_mask_equals_the_rule(noise, contrastive, hide_empty):
    function, device = noise
    result = call(
        function, make_batch(device=device), contrastive=contrastive, hide_empty=hide_empty
    )
    slots = result.labels.shape[1]
    size = slots // 3
    is_empty = result.is_empty.tolist()
    for b in range(4):
        for i in range(slots + 4):
            for j in range(slots + 4):
                both_noised = i < slots and j < slots
                sees = j >= slots or (both_noised and i // size == j // size)
                if hide_empty and j < slots and is_empty[b][j]:
                    sees = False
                sees = sees or i == j
                assert result.mask[b, 0, i, j].item() == (0 if sees else -float("inf"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_mask_has_the_asked_type_and_an_aligned_pitch(noise, dtype):
    function, device = noise
    mask = call(function, make_batch(device=device), mask_dtype=dtype).mask
    assert mask.dtype == dtype and mask.shape == (4, 1, 19, 19)
    assert mask.stride(3) == 1 and mask.stride(2) % 16 == 0


@pytest.mark.parametrize("changes", [{"num_groups": 0}, {"slots_per_group": 0}])
def test_without_slots_matched_queries_see_each_other(noise, changes):
    function, device = noise
    result = call(function, make_batch(device=device), **changes)
    assert result.labels.shape == (4, 0) and result.boxes.shape == (4, 0, 4)
    assert result.mask.shape == (4, 1, 4, 4) and (result.mask == 0).all()


def test_no_images(noise):
    function, device = noise
    batch = tuple(x[:0] for x in make_batch(device=device))
    result = call(function, batch)
    assert result.labels.shape == (0, 15) and result.mask.shape == (0, 1, 19, 19)


def test_no_gradient_flows(noise):
    function, device = noise
    labels, boxes, is_object, keys = make_batch(device=device)
    result = call(function, (labels, boxes.requires_grad_(), is_object, keys))
    assert not result.boxes.requires_grad and not result.mask.requires_grad


# ------------------------------------------------------------------------------ sameness


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("slots", [40, 25])
def test_kernels_equal_the_plain_version_to_the_last_bit(kernel_device, slots, contrastive, dtype):
    counts = (40, 3, 0, 27, 26)
    numbers = {"slots_per_group": slots, "contrastive": contrastive, "num_groups": 20}
    expected = call(noise_objects_pytorch, make_batch(counts, dtype=dtype), **numbers)
    result = call(noise_objects, make_batch(counts, dtype=dtype, device=kernel_device), **numbers)
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got.cpu(), want)


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("slots", [5, 2])
def test_noise_of_an_image_depends_on_nothing_but_its_key(noise, slots, contrastive):
    """Not on its place in the batch, its partners, or the padding."""
    function, device = noise
    numbers = {"slots_per_group": slots, "contrastive": contrastive}
    batch = make_batch(device=device)
    together = call(function, batch, **numbers)
    wider = make_batch(most=9, device=device)
    for column in (0, 1, 2):  # padding draws differ, the objects must not
        wider[column][:, :5] = batch[column]
    wider[3].copy_(batch[3])
    padded = call(function, wider, **numbers)
    turned = call(function, tuple(x.flip(0) for x in batch), **numbers)
    for field in range(4):
        assert torch.equal(together[field], padded[field])
        assert torch.equal(together[field], turned[field].flip(0))
        for b in range(4):
            alone = call(function, tuple(x[b : b + 1] for x in batch), **numbers)
            assert torch.equal(alone[field][0], together[field][b])


def test_first_groups_do_not_depend_on_the_number_of_groups(noise):
    function, device = noise
    few = call(function, make_batch(device=device), num_groups=2)
    many = call(function, make_batch(device=device), num_groups=8)
    assert torch.equal(few.boxes, many.boxes[:, :10])


def test_another_key_gives_other_noise(noise):
    function, device = noise
    labels, boxes, is_object, keys = make_batch((5,), device=device)
    first = call(function, (labels, boxes, is_object, keys))
    for other in (keys + 1, keys + (1 << 32)):  # both halves of the key count
        second = call(function, (labels, boxes, is_object, other))
        assert (first.boxes != second.boxes).all()


def test_no_global_random_state_is_touched(noise):
    function, device = noise
    before = torch.get_rng_state(), random.getstate()
    call(function, make_batch(device=device))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


MASK_CASES = (
    ((3, 1, 0, 5), {}),
    ((2, 2, 2, 2), {"num_groups": 7}),
    ((2, 2, 2, 1), {"num_groups": 7, "hide_empty": False}),
    ((6, 9, 3, 4), {"num_groups": 2, "contrastive": True, "slots_per_group": 4}),
    ((6, 0, 0, 0), {"num_groups": 0}),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("counts", "changes"), MASK_CASES)
def test_masks_of_kernels_equal_the_pytorch_version(kernel_device, counts, changes, dtype):
    numbers = {**changes, "mask_dtype": dtype}
    expected = call(noise_objects_pytorch, make_batch(counts), **numbers).mask
    mask = call(noise_objects, make_batch(counts, device=kernel_device), **numbers).mask
    assert torch.equal(mask.cpu(), expected)


# ---------------------------------------------------------------------------- statistics


def draw_many(function, device, images=400, groups=50, **changes):
    """A large box in the middle, 20000 times: nothing is clamped."""
    labels = torch.full((images, 1), 2, device=device)
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.2], device=device).expand(images, 1, 4)
    is_object = torch.ones(images, 1, dtype=torch.bool, device=device)
    keys = torch.arange(images, device=device)
    return call(function, (labels, boxes, is_object, keys), num_groups=groups, **changes)


def assert_uniform(values, low, high):
    """Kolmogorov-Smirnov: one sample in a hundred thousand would fail."""
    scaled = (values.double().cpu().flatten().sort().values - low) / (high - low)
    count = scaled.numel()
    assert scaled.min() >= -1e-5 and scaled.max() <= 1 + 1e-5
    distance = (scaled - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 2.5 / count**0.5


def test_plain_noise_is_uniform_and_independent(noise):
    function, device = noise
    boxes = draw_many(function, device).boxes.double().cpu()
    half = torch.tensor([0.2, 0.1], dtype=torch.float64)
    numbers = torch.cat((boxes[..., :2] - 0.5, boxes[..., 2:] - 2 * half), dim=-1)
    numbers = numbers / torch.cat((half, 2 * half)) / 0.4
    for i in range(4):
        assert_uniform(numbers[..., i], -1, 1)
    correlation = torch.corrcoef(numbers.flatten(0, 1).T)
    assert (correlation - torch.eye(4)).abs().max() < 5 / 20000**0.5


def test_contrastive_noise_moves_positives_less_than_negatives(noise):
    function, device = noise
    boxes = draw_many(function, device, contrastive=True, box_noise=0.45).boxes.double().cpu()
    half = torch.tensor([0.2, 0.1], dtype=torch.float64)
    centre, reach = boxes[..., :2], boxes[..., 2:] / 2
    sides = torch.cat((centre - reach, centre + reach), dim=-1)
    moved = (sides - torch.cat((0.5 - half, 0.5 + half))) / half.repeat(2) / 0.45
    positives, negatives = moved.unflatten(1, (50, 2)).unbind(2)
    for i in range(4):
        assert_uniform(positives[..., i].abs(), 0, 1)
        assert_uniform(negatives[..., i].abs(), 1, 2)
        for side in (positives[..., i], negatives[..., i]):
            assert abs((side > 0).double().mean() - 0.5) < 5 * 0.5 / 20000**0.5


@pytest.mark.parametrize("label_noise", [0.0, 0.2, 1.0])
def test_labels_are_redrawn_as_often_as_asked_and_uniformly(noise, label_noise):
    function, device = noise
    labels = draw_many(function, device, label_noise=label_noise).labels.flatten()
    share = torch.bincount(labels.cpu(), minlength=CLASSES).double() / labels.numel()
    assert len(share) == CLASSES  # never the class "unknown"
    expected = torch.full((CLASSES,), label_noise / CLASSES)
    expected[2] += 1 - label_noise
    assert (share - expected).abs().max() < 5 * 0.5 / 20000**0.5 * (label_noise > 0) + 1e-9


def test_positive_and_negative_labels_are_redrawn_independently(noise):
    function, device = noise
    labels = draw_many(function, device, contrastive=True, label_noise=0.5, num_classes=1000).labels
    positive, negative = (labels != 2).unflatten(1, (50, 2)).double().unbind(2)
    assert abs((positive * negative).mean() - positive.mean() * negative.mean()) < 0.02


def test_boxes_stay_inside_the_image_and_are_finite(noise):
    function, device = noise
    for contrastive in (False, True):
        boxes = call(
            function, make_batch((40, 40), device=device), box_noise=2.0, contrastive=contrastive
        ).boxes
        assert (boxes >= 0).all() and (boxes <= 1).all()


def test_overfull_images_give_each_group_its_own_uniform_subset(noise):
    function, device = noise
    images, groups, most, slots = 100, 40, 6, 2
    batch = make_batch((most,) * images, device=device)
    assignment = call(function, batch, num_groups=groups, slots_per_group=slots).assignment
    subsets = assignment.view(images, groups, slots).cpu()
    assert (subsets[..., 0] != subsets[..., 1]).all()
    share = torch.bincount(subsets.flatten(), minlength=most).double() / subsets.numel()
    assert (share - 1 / most).abs().max() < 5 * (1 / most / subsets.numel()) ** 0.5
    pairs = subsets.sort(-1).values
    same = (pairs[:, 1:] == pairs[:, :-1]).all(-1).double().mean()
    assert abs(same - 1 / 15) < 0.02  # 15 pairs of 6


def test_positives_and_negatives_are_made_of_the_same_objects(noise):
    function, device = noise
    labels, boxes, is_object, keys = make_batch((9, 9), device=device)
    labels = torch.arange(9, device=device).expand(2, 9)
    result = call(
        function,
        (labels, boxes, is_object, keys),
        slots_per_group=4,
        contrastive=True,
        label_noise=0.0,
        num_classes=9,
    )
    positive, negative = result.labels.unflatten(1, (3, 2, 4)).unbind(2)
    assert torch.equal(positive, negative)


# -------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "place", "change"),
    [
        ("labels", 0, lambda x: x[0]),
        ("labels", 0, lambda x: x.int()),
        ("boxes", 1, lambda x: x[..., :3]),
        ("boxes", 1, lambda x: x.half()),
        ("is_object", 2, lambda x: x[:, :1]),
        ("is_object", 2, lambda x: x.long()),
        ("noise_seeds", 3, lambda x: x[:1]),
        ("noise_seeds", 3, lambda x: x.float()),
    ],
)
def test_errors_say_what_was_expected_and_what_came(noise, name, place, change):
    function, device = noise
    batch = list(make_batch(device=device))
    batch[place] = change(batch[place])
    with pytest.raises(ValueError, match=f"{name}.* got "):
        call(function, batch, slots_per_group=1)


def test_more_slots_than_objects_are_refused(noise):
    function, device = noise
    with pytest.raises(ValueError, match=r"slots_per_group in \[0, 5\].* got .*6"):
        call(function, make_batch(device=device), slots_per_group=6)
