import copy

import numpy as np
import pytest
import torch
from torch import nn

from scellst_ray.models.moco.lars import Lars, new_moco_optimiser


def make_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    return model.to(memory_format=torch.channels_last)


def backward(model, seed):
    model.zero_grad()
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


def reference_step(weight, gradient, buffer, lr, momentum=0.9, decay=1e-6, trust=1e-3):
    """Return weight and buffer after one step of the method's description, in float64."""
    update = gradient.copy()
    if weight.ndim > 1:
        update = update + decay * weight
        length, size = np.sqrt((weight**2).sum()), np.sqrt((update**2).sum())
        if length > 0 and size > 0:
            update = update * (trust * length / size)
    buffer = momentum * buffer + update
    return weight - lr * buffer, buffer


@pytest.mark.parametrize("decay", [1e-6, 0.3])
def test_steps_equal_those_written_out(decay):
    model = make_model()
    optimiser = Lars(model.parameters(), lr=0.1, weight_decay=decay)
    weights = [p.detach().numpy().astype(np.float64) for p in model.parameters()]
    buffers = [np.zeros_like(w) for w in weights]
    for step in range(4):
        lr = 0.4 * (step + 1)
        optimiser.param_groups[0]["lr"] = lr
        backward(model, step)
        gradients = [p.grad.numpy().astype(np.float64) for p in model.parameters()]
        optimiser.step()
        for number, parameter in enumerate(model.parameters()):
            weights[number], buffers[number] = reference_step(
                weights[number], gradients[number], buffers[number], lr, decay=decay
            )
            np.testing.assert_allclose(parameter.detach().numpy(), weights[number], 1e-4, 1e-6)
            assert np.array_equal(parameter.grad.numpy(), gradients[number].astype(np.float32))
            # Each step starts from the same numbers, since rounding grows through the network.
            weights[number] = parameter.detach().numpy().astype(np.float64)


def test_a_layer_moves_by_trust_times_its_length_whatever_the_gradient():
    for size in (1e-6, 1.0, 1e6):
        weight = nn.Parameter(torch.randn(7, 5, generator=torch.Generator().manual_seed(1)))
        before = weight.detach().clone()
        weight.grad = size * torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
        Lars([weight], lr=1.0, weight_decay=0.0).step()
        assert (weight - before).norm().item() == pytest.approx(1e-3 * before.norm().item(), 1e-4)


def test_zero_weights_and_zero_gradients_are_not_scaled():
    weight, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    weight.grad, still.grad = torch.full((2, 2), 3.0), torch.zeros(2, 2)
    Lars([weight, still], lr=0.5, weight_decay=0.0).step()
    assert torch.equal(weight.detach(), torch.full((2, 2), -1.5))
    assert torch.equal(still.detach(), torch.ones(2, 2))


def test_parameters_without_gradient_stay():
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimiser = Lars(model.parameters(), lr=1.0)
    optimiser.step()
    model[3].weight.grad = torch.ones_like(model[3].weight)
    optimiser.step(lambda: 2.0)
    changed = [
        not torch.equal(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True)
    ]
    assert changed == [False, False, False, False, True, False]
    assert Lars([nn.Parameter(torch.ones(2))], lr=0).step(lambda: 2.0) == 2.0


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_a_saved_state_goes_on_bit_for_bit(name, tmp_path):
    model = make_model()
    optimiser = new_moco_optimiser(name, model, lr=0.1)
    for step in range(2):
        backward(model, step)
        optimiser.step()
    torch.save(optimiser.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(model)
    resumed = new_moco_optimiser(name, other)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for m, o in ((model, optimiser), (other, resumed)):
        for step in (2, 3):
            backward(m, step)
            o.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_published_settings_and_what_they_apply_to():
    model = make_model()
    model[0].requires_grad_(requires_grad=False)
    lars = new_moco_optimiser("lars", model)
    settings = {name: lars.param_groups[0][name] for name in ("momentum", "weight_decay", "trust")}
    assert settings == {"momentum": 0.9, "weight_decay": 1e-6, "trust": 0.001}
    assert len(lars.param_groups[0]["params"]) == 4
    assert new_moco_optimiser("adamw", model).param_groups[0]["weight_decay"] == 0.1
    assert new_moco_optimiser("adamw", model, weight_decay=0).param_groups[0]["weight_decay"] == 0
    with pytest.raises(ValueError, match="expected 'lars' or 'adamw'"):
        new_moco_optimiser("sgd", model)


@pytest.mark.parametrize(
    "setting", [{"lr": -1}, {"momentum": 1}, {"weight_decay": float("nan")}, {"trust": -0.1}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=f"LARS: {next(iter(setting))} is"):
        Lars([nn.Parameter(torch.ones(1))], **({"lr": 0.1} | setting))
