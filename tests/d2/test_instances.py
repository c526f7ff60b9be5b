"""Between pixels of Detectron2 and the values of the core."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from dn_detr.d2.modeling.instances import noise_seed, to_instances, to_target
from dn_detr.models.postprocess import postprocess
from dn_detr.structures import Predictions, Segment


def instances_of(boxes, classes, size=(50, 200)) -> Instances:
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def test_boxes_become_centres_and_sizes_in_shares_of_the_image():
    target = to_target(
        instances_of([[20, 10, 60, 20], [0, 0, 200, 50]], [2, 0]), num_classes=3, noise_seed=9
    )
    expected = torch.tensor([[0.2, 0.3, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0]])
    torch.testing.assert_close(target.boxes, expected)
    assert target.labels.tolist() == [2, 0] and target.noise_seed == 9


def test_an_image_without_objects_is_an_empty_target():
    target = to_target(instances_of([], []), num_classes=3, noise_seed=0)
    assert target.boxes.shape == (0, 4) and target.labels.shape == (0,)


@pytest.mark.parametrize("label", [-1, 3])
def test_classes_outside_of_the_model_are_refused(label):
    with pytest.raises(ValueError, match=r"gt_classes must be in \[0, 3\)"):
        to_target(instances_of([[0, 0, 5, 5]], [label]), num_classes=3, noise_seed=0)


def test_boxes_survive_the_way_into_the_core_and_back():
    """Confident predictions of the ground truth itself are read out as that ground truth."""
    instances = instances_of([[20, 10, 60, 20], [0, 0, 200, 50], [199, 0, 200, 1]], [2, 0, 1])
    target = to_target(instances, num_classes=3, noise_seed=0)
    logits = torch.full((1, 1, 3, 3), -20.0)
    logits[0, 0, range(3), target.labels] = torch.tensor([9.0, 8.0, 7.0])
    predictions = Predictions(
        logits=logits,
        boxes=target.boxes[None, None],
        references=(None,),
        segments=(Segment("match", 3),),
    )
    (detections,) = postprocess(predictions, [(50, 200)], top_k=3)
    found = to_instances(detections, (50, 200))
    torch.testing.assert_close(found.pred_boxes.tensor, instances.gt_boxes.tensor)
    assert found.pred_classes.tolist() == [2, 0, 1]
    torch.testing.assert_close(found.scores, torch.tensor([9.0, 8.0, 7.0]).sigmoid())


def test_noise_keys_depend_on_seed_iteration_and_image_and_on_nothing_else():
    keys = {
        (seed, iteration, image): noise_seed(seed, iteration, image)
        for seed in (0, 1, 42)
        for iteration in (0, 1, 1000)
        for image in (0, 1, 397133, "a.jpg")
    }
    assert len(set(keys.values())) == len(keys)
    assert all(0 <= key < 2**63 for key in keys.values())
    assert noise_seed(0, 1, 1) == keys[0, 1, 1]
    assert noise_seed(0, np.int64(1000), np.int64(1)) == keys[0, 1000, 1]
    # Neighbours differ in about half of their bits: noise of one image says nothing of the next.
    flips = [(noise_seed(0, i, 5) ^ noise_seed(0, i + 1, 5)).bit_count() for i in range(200)]
    assert 26 < sum(flips) / len(flips) < 37
