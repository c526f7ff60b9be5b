"""Mixed images: pixels by hand, objects of both."""

import torch
from detectron2.structures import BitMasks, Boxes, Instances
from samples import sample, with_teacher

from dn_detr.d2.data.mixup import mix, mix_batch

FILL = (100, 110, 120)


def make_sample(number, height, width, value, boxes):
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.arange(len(boxes)) + 10 * number
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    instances.gt_masks = BitMasks(masks)
    image = torch.full((3, height, width), value, dtype=torch.uint8)
    return {
        "image_id": number,
        "image": image,
        "instances": instances,
        "file_name": f"{number}.png",
    }


def test_pixels_and_objects_of_two_images_of_other_size():
    one = make_sample(1, 4, 6, 200, [[0, 0, 2, 3]])
    other = make_sample(2, 5, 3, 50, [[1, 1, 3, 5], [0, 0, 1, 1]])
    mixed = mix(one, other, 0.46, FILL)
    image = mixed["image"]
    assert image.dtype == torch.uint8 and image.shape == (3, 5, 6)
    assert image[:, 2, 1].tolist() == [119] * 3  # 0.46 x 200 + 0.54 x 50
    assert image[:, 2, 4].tolist() == [146, 151, 157]  # 0.46 x 200 + 0.54 x (100, 110, 120)
    assert image[:, 4, 1].tolist() == [73, 78, 82]  # 0.46 x (100, 110, 120) + 0.54 x 50
    assert image[:, 4, 5].tolist() == list(FILL)
    instances = mixed["instances"]
    assert instances.image_size == (5, 6)
    assert instances.gt_classes.tolist() == [10, 20, 21]
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 2, 3], [1, 1, 3, 5], [0, 0, 1, 1]]
    around = instances.gt_masks.get_bounding_boxes().tensor
    assert torch.equal(around, instances.gt_boxes.tensor)
    # The sources stay as they were.
    assert one["image"].shape == (3, 4, 6) and len(other["instances"]) == 2


def test_boxes_of_a_teacher_are_mixed_with_their_scores():
    batch = [with_teacher(sample(i, 2), 3 + i) for i in range(2)]
    mixed = mix_batch(batch, 0.5, FILL)[0]["teacher_instances"]
    parts = [batch[i]["teacher_instances"] for i in (0, 1)]
    assert len(mixed) == 7 and mixed.image_size == parts[0].image_size
    assert torch.equal(mixed.scores, torch.cat([part.scores for part in parts]))
    assert torch.equal(mixed.gt_boxes.tensor[3:], parts[1].gt_boxes.tensor)


def test_every_image_of_a_batch_is_mixed_with_the_one_before_it():
    batch = [make_sample(i, 4, 4, 60 * i, [[0, 0, 1, 1]] * i) for i in range(4)]
    mixed = mix_batch(batch, 0.55, FILL)
    assert [one["image_id"] for one in mixed] == ["0&3", "1&0", "2&1", "3&2"]
    assert [len(one["instances"]) for one in mixed] == [3, 1, 3, 5]
    values = [int(one["image"][0, 0, 0]) for one in mixed]
    assert values == [81, 33, 93, 153]  # 0.55 x own + 0.45 x the one before


def test_images_without_objects_mix_too():
    mixed = mix_batch([make_sample(i, 4, 4, 9, []) for i in range(2)], 0.5, FILL)
    assert [len(one["instances"]) for one in mixed] == [0, 0]
    assert mixed[0]["instances"].gt_masks.tensor.shape == (0, 4, 4)
