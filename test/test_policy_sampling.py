"""Samplers against diffusers' schedulers, and against solutions known in closed form."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from dit_policy_ros.policy.configuration import DiffusionConfig, FlowMatchingConfig
from dit_policy_ros.policy.objectives import Diffusion, FlowMatching, cosine_alphas_cumprod, masked_mse
from dit_policy_ros.policy.sampling import diffusion_timesteps, sample


def network(x, timestep):
    """Some smooth function of both, larger than the clipping range in places."""
    return 1.3 * torch.sin(2 * x + 0.05 * timestep.view(-1, 1, 1))


def diffusers_loop(scheduler, x, steps, generator):
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        output = network(x, torch.full((len(x),), int(timestep)))
        x = scheduler.step(output, timestep, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [100, 20, 5, 1])
@pytest.mark.parametrize(("sampler", "scheduler"), [("ddim", DDIMScheduler), ("ddpm", DDPMScheduler)])
def test_diffusion_samplers_are_diffusers(sampler, scheduler, steps, spacing, prediction):
    config = DiffusionConfig(prediction_type=prediction, sampler=sampler, timestep_spacing=spacing)
    oracle = scheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction,
        clip_sample=True,
        timestep_spacing=spacing,
    )
    x = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0))
    expected = diffusers_loop(oracle, x, steps, torch.Generator().manual_seed(1))
    actual = sample(network, x, Diffusion(config), steps, torch.Generator().manual_seed(1))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("spacing", "first", "last"), [("trailing", 99, 9), ("leading", 90, 0)])
def test_spacing_decides_which_timesteps_are_visited(spacing, first, last):
    visited = diffusion_timesteps(100, 10, spacing)
    assert (visited[0], visited[-1], len(visited)) == (first, last, 10)
    assert diffusion_timesteps(100, 100, spacing) == list(range(99, -1, -1))


def test_any_number_of_steps_visits_that_many_distinct_timesteps():
    for steps in range(1, 101):
        visited = diffusion_timesteps(100, steps, "trailing")
        assert len(set(visited)) == steps
        assert visited == sorted(visited, reverse=True)
        assert visited[0] == 99
        assert visited[-1] >= 0


def test_euler_integrates_the_velocity_it_is_given():
    objective = FlowMatching(FlowMatchingConfig())
    x = torch.randn(2, 4, 3)
    constant = sample(lambda x, t: torch.full_like(x, 0.7), x, objective, 4)
    torch.testing.assert_close(constant, x + 0.7)
    decay = sample(lambda x, t: -x, x, objective, 8)
    torch.testing.assert_close(decay, x * (1 - 1 / 8) ** 8)
    # Left end points of a velocity 2t: the sum over i of 2 (i / 4) / 4 = 0.75.
    torch.testing.assert_close(sample(lambda x, t: 2 * t.view(-1, 1, 1).expand_as(x), x, objective, 4), x + 0.75)


def test_flow_and_diffusion_recover_data_from_a_perfect_network():
    """A network that knows the data: every sampler must arrive at it from any noise."""
    data = 0.9 * torch.tanh(torch.randn(2, 6, 3))
    x = torch.randn(2, 6, 3)
    flow = sample(lambda x, t: (data - x) / (1 - t.view(-1, 1, 1)), x, FlowMatching(FlowMatchingConfig()), 10)
    torch.testing.assert_close(flow, data, atol=1e-5, rtol=0)
    alphas = cosine_alphas_cumprod(100)

    def epsilon(x, t):
        alpha_bar = alphas[t].view(-1, 1, 1)
        return (x - alpha_bar.sqrt() * data) / (1 - alpha_bar).sqrt()

    for sampler in ("ddim", "ddpm"):
        actual = sample(epsilon, x, Diffusion(DiffusionConfig(sampler=sampler)), 10)
        torch.testing.assert_close(actual, data, atol=1e-4, rtol=0)


def test_clipping_may_be_switched_off():
    far = torch.full((1, 2, 1), 3.0)
    predict = lambda x, t: far  # noqa: E731
    clipped = sample(predict, torch.zeros_like(far), Diffusion(DiffusionConfig(prediction_type="sample")), 5)
    free = DiffusionConfig(prediction_type="sample", clip_range=None)
    assert clipped.max() == 1
    assert sample(predict, torch.zeros_like(far), Diffusion(free), 5).min() == 3


def test_noise_schedule_is_the_published_one():
    """Nichol and Dhariwal's eq. 17, from its definition: alpha_bar(t) = f(t) / f(0)."""
    signal = cosine_alphas_cumprod(100)
    f = [math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(101)]
    expected = torch.tensor([f[i + 1] / f[0] for i in range(99)])
    torch.testing.assert_close(signal[:99], expected, atol=1e-5, rtol=1e-4)
    oracle = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert torch.equal(signal, oracle)


def test_training_timesteps_cover_their_range():
    torch.manual_seed(0)
    device = torch.device("cpu")
    steps = Diffusion(DiffusionConfig(num_train_timesteps=7)).draw_timesteps(2000, device)
    assert set(steps.tolist()) == set(range(7))
    uniform = FlowMatching(FlowMatchingConfig(timestep_sampling="uniform")).draw_timesteps(20000, device)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    beta = FlowMatching(FlowMatchingConfig()).draw_timesteps(20000, device)
    # The mean of Beta(1.5, 1) is 1.5 / 2.5.
    assert beta.mean().item() == pytest.approx(0.999 * (1 - 0.6), abs=0.01)
    assert 0 <= beta.min() <= beta.max() <= 0.999


def test_masked_loss_counts_only_what_is_kept():
    prediction, target = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    target[0, 2] = 100.0
    target[1, 1:] = 100.0
    is_pad = torch.tensor([[False, False, True], [False, True, True]])
    assert masked_mse(prediction, target, is_pad).item() == 1.0
    assert masked_mse(prediction, target, None).item() > 1000
    assert masked_mse(prediction, target, torch.ones(2, 3, dtype=torch.bool)).item() == 0.0
