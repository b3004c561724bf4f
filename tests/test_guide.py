import math

import pytest
import torch
from torch.testing import assert_close

from clipft.guide import crop_affine_flip, great_circle


def on_circle(angle: float) -> torch.Tensor:
    return torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


@pytest.mark.parametrize("angle", [0.001, 0.3, 1.0, math.pi / 2, 3.0])
def test_the_distance_is_half_the_squared_angle(angle: float):
    assert_close(great_circle(on_circle(0.7), on_circle(0.7 + angle)), torch.tensor(angle**2 / 2).double())


@pytest.mark.parametrize("angle", [0.0, 1e-9, math.pi])
def test_the_gradient_is_finite_where_vectors_meet_and_where_they_oppose(angle: float):
    for dtype in (torch.float32, torch.float64):
        a = on_circle(0.0).to(dtype).requires_grad_()
        great_circle(a, on_circle(angle).to(dtype)).backward()
        assert a.grad is not None and a.grad.isfinite().all()


def test_views_of_a_picture_have_the_size_of_the_model_and_differ():
    torch.manual_seed(0)
    image, draw = torch.rand(3, 50, 70), crop_affine_flip(16)
    views = torch.stack([draw(image) for _ in range(8)])
    assert views.shape == (8, 3, 16, 16) and len(views.unique(dim=0)) == 8
    torch.manual_seed(0)
    torch.rand(3, 50, 70)
    assert torch.equal(torch.stack([draw(image) for _ in range(8)]), views)
