"""The operators of a training step do not become more."""

import pytest
import torch

pytest.importorskip("detectron2")


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize(("precision", "most"), [("float32", 1719), ("bfloat16", 1933)])
def test_a_step_of_dn_deformable_detr_launches_no_more_operators(precision, most):
    from launches import count_operators
    from train_step import Case

    counts = count_operators(Case("configs/dn_deformable.yaml", 2, (64, 96), "cpu", precision))
    assert counts.total() <= most
    norms = sum(n for (_, name), n in counts.items() if name == "aten._foreach_norm.Scalar")
    assert norms == 1  # report and clipping share it


@pytest.mark.usefixtures("benchmarks")
def test_views_and_memory_are_not_counted_and_backward_belongs_to_its_forward():
    from launches import OperatorCounter, launches

    x = torch.ones(2, 3, requires_grad=True)
    with OperatorCounter() as counter:
        with counter.within("heads"):
            y = x.t().reshape(3, 2)[:1].exp()
        y.sum().backward()
        torch.empty(3).view(3, 1)
    names = {(part, name.split(".")[1]): n for (part, name), n in counter.counts.items()}
    assert names["heads", "exp"] == 1 and names["heads, backward", "mul"] == 1
    assert names["step", "sum"] == 1
    assert not {"view", "t", "empty", "slice"} & {name for _, name in names}
    pair = [torch.ones(2), torch.ones(2)]
    assert launches("aten._foreach_mul.List", (pair, pair)) == 1
    assert launches("aten._foreach_mul.List", (pair, [torch.ones(1), torch.ones(2)])) == 2
