import torch
from torch import nn
from torch.testing import assert_close

from clipft.config import OptimConfig
from clipft.learn.optimizer import build_optimizer, gradient_norm, scale_gradients


def alike(model: nn.Module) -> dict[str, float]:
    return dict.fromkeys(dict(model.named_parameters()), 1.0)


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    decay, rest = build_optimizer(model, OptimConfig(weight_decay=0.3), alike(model)).param_groups
    assert decay["weight_decay"] == 0.3 and [p is model[0].weight for p in decay["params"]] == [True]
    assert rest["weight_decay"] == 0 and {p.shape for p in rest["params"]} == {torch.Size([4])}
    assert len(rest["params"]) == 3


def test_a_step_is_that_of_adamw_with_these_settings():
    config = OptimConfig(weight_decay=0.2, beta1=0.8, beta2=0.95, eps=1e-3)
    ours, theirs = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, config, alike(ours))
    optimizer.param_groups[0]["lr"] = 0.1
    reference = torch.optim.AdamW(theirs.parameters(), 0.1, (0.8, 0.95), 1e-3, 0.2, foreach=False)
    for step in range(3):
        for model, each in ((ours, optimizer), (theirs, reference)):
            model.weight.grad = torch.full((3, 3), float(step + 1)).triu()
            each.step()
    assert_close(ours.weight, theirs.weight)


def test_norm_and_scaling_are_over_all_gradients():
    model = nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 2), 3.0), torch.tensor([4.0, 0.0])
    assert_close(gradient_norm(model.parameters()), torch.tensor(52.0).sqrt())
    scale_gradients(model.parameters(), torch.tensor(0.5))
    assert model.weight.grad.tolist() == [[1.5, 1.5], [1.5, 1.5]] and model.bias.grad.tolist() == [2.0, 0.0]
