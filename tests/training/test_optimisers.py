"""The rules that a stage may follow: sign descent by its formula, names, and one step of each."""

import pytest
import torch

from lpft_nb.stages import FineTune, LoRA
from lpft_nb.training.optimisers import OPTIMISERS, SignDescent, make_optimiser


def parameters(*gradients):
    made = [torch.nn.Parameter(torch.linspace(-1, 1, len(one)).double()) for one in gradients]
    for parameter, gradient in zip(made, gradients):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    return made


def test_signs_move_every_weight_by_its_groups_rate():
    first, second = parameters([1e-9, -7.0, 0.0], [2.0, -2.0])
    still = torch.nn.Parameter(torch.ones(2))  # never had a gradient
    before = [first.detach().clone(), second.detach().clone()]
    groups = [{"params": [first, still], "lr": 0.5}, {"params": [second], "lr": 0.25}]
    SignDescent(groups, weight_decay=0.1).step()
    expected = [
        0.95 * before[0] - 0.5 * torch.tensor([1.0, -1.0, 0.0]),
        0.975 * before[1] - 0.25 * torch.tensor([1.0, -1.0]),
    ]
    torch.testing.assert_close([first.detach(), second.detach()], expected)
    assert torch.equal(still, torch.ones(2))


def test_a_closure_is_called_and_its_loss_returned():
    weight = torch.nn.Parameter(torch.tensor([2.0]))

    def closure():
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert SignDescent([weight], lr=0.5).step(closure).item() == 4
    assert weight.item() == 1.5


def test_sign_descent_reaches_a_minimum_up_to_its_rate():
    weight, target = torch.nn.Parameter(torch.zeros(3)), torch.tensor([1.0, -2.0, 0.3])
    optimiser = SignDescent([weight], lr=0.01)
    for _ in range(400):
        optimiser.zero_grad()
        (weight - target).square().sum().backward()
        optimiser.step()
    assert (weight - target).abs().max() <= 0.0101


def test_adam_begins_with_the_signs():
    ends = {}
    for name in OPTIMISERS:
        (weight,) = parameters([3.0, -0.2, 1e-4])
        make_optimiser([{"params": [weight], "lr": 0.1, "weight_decay": 0.0}], name).step()
        ends[name] = weight.detach()
    torch.testing.assert_close(ends["adamw"], ends["signgd"], rtol=0, atol=1e-4)
    (weight,) = parameters([3.0, -0.2, 1e-4])
    torch.testing.assert_close(ends["sgd"], weight.detach() - 0.1 * weight.grad)


@pytest.mark.parametrize("options", [dict(lr=0.0), dict(lr=-1.0), dict(lr=0.1, weight_decay=-1.0)])
def test_rates_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="rate above zero"):
        SignDescent([torch.nn.Parameter(torch.ones(1))], **options)


@pytest.mark.parametrize("stage", [FineTune, LoRA])
def test_an_unknown_rule_is_refused_with_a_close_name(stage):
    with pytest.raises(ValueError, match="unknown optimiser 'signsgd'.*signgd"):
        stage(optimiser="signsgd")
    assert stage().optimiser == "adamw"
