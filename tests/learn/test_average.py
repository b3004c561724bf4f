import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clipft.learn.average import Average


def make() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def statistics(model: nn.Sequential) -> torch.Tensor:
    return model.get_buffer("1.running_mean")


def move(model: nn.Module) -> None:
    """A step that moves what is trained, and the statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * parameter.requires_grad
    model(torch.randn(8, 3))


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_average_is_that_of_torch_but_for_steps_that_are_left_out(decay):
    model = make()
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    reference.update_parameters(model)  # its first call takes the weights over
    average = Average(model, decay, with_buffers=False, start={})
    for step in range(6):
        move(model)
        average.update(torch.tensor(step == 3))
        if step != 3:
            reference.update_parameters(model)
    theirs = dict(reference.module.named_parameters())
    assert average.values.keys() == {name for name, value in theirs.items() if value.requires_grad}
    assert all(torch.equal(value, theirs[name]) for name, value in average.values.items())


def test_what_does_not_move_stays_bit_for_bit():
    model = make()
    before = copy.deepcopy(model.state_dict())
    average = Average(model, 0.999, with_buffers=False, start={})
    for _ in range(50):
        average.update(torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in average.values.items())


def test_statistics_are_averaged_where_they_are_trained():
    model = make()
    average = Average(model, 0.5, with_buffers=True, start={})
    start = statistics(model).clone()
    move(model)
    average.update(torch.tensor(False))
    assert torch.allclose(average.values["1.running_mean"], (start + statistics(model)) / 2)
    assert "1.num_batches_tracked" not in average.values


def test_the_model_has_the_averages_for_a_while_and_then_its_own_weights_also_after_an_error():
    model = make()
    average = Average(model, 0.5, with_buffers=False, start={})
    move(model)
    average.update(torch.tensor(False))
    own, mean = copy.deepcopy(model.state_dict()), copy.deepcopy(average.values)
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in mean.items())
        raise ZeroDivisionError
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, mean[name]) for name, value in average.values.items())


def test_an_average_goes_on_from_saved_values():
    model = make()
    saved = {"2.weight": torch.zeros(2, 4, dtype=torch.float64)}
    average = Average(model, 0.75, with_buffers=False, start=saved)
    average.update(torch.tensor(False))
    assert torch.allclose(average.values["2.weight"], model.get_parameter("2.weight") / 4)
    assert (
        torch.equal(average.values["2.bias"], model.get_parameter("2.bias"))
        and not average.values["2.weight"].requires_grad
    )
