"""Samplers against diffusers' schedulers, and against solutions known in closed form."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from dit_policy_ros.policy.configuration import DiffusionConfig, FlowMatchingConfig, PolicyConfig
from dit_policy_ros.policy.diffusion_plan import diffusion_timesteps
from dit_policy_ros.policy.noise import draw_step_noise
from dit_policy_ros.policy.objectives import PLANS, Diffusion, FlowMatching, cosine_alphas_cumprod, squared_error
from dit_policy_ros.policy.plan import guide, token_timesteps
from dit_policy_ros.policy.sampling import Sampling, make_plan

FLOW = FlowMatching(FlowMatchingConfig())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def network(x, timestep):
    """Some smooth function of both, larger than the clipping range in places."""
    return 1.3 * torch.sin(2 * x + 0.05 * timestep)


def run(plan, predict, x, generator=None):
    """The plan's loop for predict(x, timestep)."""
    step_noise = draw_step_noise(plan, x, generator)
    return plan.run(lambda x, call: predict(x, plan.timesteps[call]), x, step_noise)


def diffusers_loop(scheduler, x, generator=None):
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, timestep), timestep, x, generator=generator).prev_sample
    return x


PREDICTIONS = ["epsilon", "sample", "v_prediction"]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [100, 20, 5, 1])
@pytest.mark.parametrize(("sampler", "scheduler"), [("ddim", DDIMScheduler), ("ddpm", DDPMScheduler)])
def test_ddim_and_ddpm_are_diffusers(sampler, scheduler, steps, spacing, prediction):
    config = DiffusionConfig(prediction_type=prediction, timestep_spacing=spacing)
    oracle = scheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction,
        clip_sample=True,
        timestep_spacing=spacing,
    )
    oracle.set_timesteps(steps)
    x = torch.randn(3, 8, 2, generator=seeded(0))
    expected = diffusers_loop(oracle, x, seeded(1))
    actual = run(make_plan(Diffusion(config), sampler, steps, "cpu"), network, x, seeded(1))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


class ClippedDPMSolver(DPMSolverMultistepScheduler):
    """diffusers' solver with its estimate of the clean sample clipped, as its DDIM does; it has no such option."""

    def convert_model_output(self, *args, **kwargs):
        return super().convert_model_output(*args, **kwargs).clamp(-1, 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [100, 20, 5, 2, 1])
@pytest.mark.parametrize(("clip", "scheduler"), [(1.0, ClippedDPMSolver), (None, DPMSolverMultistepScheduler)])
def test_dpm_solver_is_diffusers(clip, scheduler, steps, spacing, prediction):
    oracle = scheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction,
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=True,
    )
    # Its own "leading" takes another stride than diffusers' DDIM, which is ours: the timesteps are given.
    oracle.set_timesteps(timesteps=diffusion_timesteps(100, steps, spacing))
    config = DiffusionConfig(prediction_type=prediction, timestep_spacing=spacing, clip_range=clip)
    x = torch.randn(3, 8, 2, generator=seeded(0))
    actual = run(make_plan(Diffusion(config), "dpm_solver++", steps, "cpu"), network, x)
    expected = diffusers_loop(oracle, x)
    # Unclipped estimates reach the thousands at the noisiest timestep, where the signal is 5e-5.
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0 if clip else 2e-4)


def test_dpm_solver_trailing_visits_diffusers_timesteps():
    oracle = DPMSolverMultistepScheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"
    )
    for steps in (1, 2, 5, 10, 20, 50, 100):
        oracle.set_timesteps(steps)
        assert diffusion_timesteps(100, steps, "trailing") == oracle.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_solvers_without_clipping_agree_with_diffusers_ddim(spacing):
    oracle = DDIMScheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing=spacing
    )
    oracle.set_timesteps(20)
    x = torch.randn(3, 8, 2, generator=seeded(0))
    config = DiffusionConfig(timestep_spacing=spacing, clip_range=None)
    actual = run(make_plan(Diffusion(config), "ddim", 20, "cpu"), network, x)
    torch.testing.assert_close(actual, diffusers_loop(oracle, x), atol=2e-5, rtol=2e-4)


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


def diffusers_flow(scheduler, x, sigmas, timesteps):
    """diffusers' time is sigma = 1 - t times 1000, and its velocity points from data to noise."""
    scheduler.sigmas, scheduler.timesteps = sigmas, timesteps
    for timestep in timesteps:
        velocity = -network(x, 1 - timestep / 1000)
        x = scheduler.step(velocity, timestep, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_euler_is_diffusers(steps):
    oracle = FlowMatchEulerDiscreteScheduler()
    sigmas = torch.linspace(1, 0, steps + 1)
    x = torch.randn(3, 8, 2, generator=seeded(0))
    expected = diffusers_flow(oracle, x, sigmas, 1000 * sigmas[:-1])
    torch.testing.assert_close(run(make_plan(FLOW, "euler", steps, "cpu"), network, x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_heun_is_diffusers(steps):
    """Its last step by Euler's method included."""
    oracle = FlowMatchHeunDiscreteScheduler()
    sigmas = torch.linspace(1, 0, steps + 1)
    sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    oracle.prev_derivative, oracle.dt, oracle.num_inference_steps = None, None, steps
    oracle.set_begin_index(0)
    x = torch.randn(3, 8, 2, generator=seeded(0))
    # What set_timesteps gives, but for its last sigma of 1 / 1000, which a network trained in steps needs.
    expected = diffusers_flow(oracle, x, sigmas, 1000 * sigmas[:-1])
    torch.testing.assert_close(run(make_plan(FLOW, "heun", steps, "cpu"), network, x), expected, atol=1e-5, rtol=0)


def test_euler_integrates_the_velocity_it_is_given():
    x = torch.randn(2, 4, 3)
    plans = {steps: make_plan(FLOW, "euler", steps, "cpu") for steps in (4, 8)}
    torch.testing.assert_close(run(plans[4], lambda x, t: torch.full_like(x, 0.7), x), x + 0.7)
    torch.testing.assert_close(run(plans[8], lambda x, t: -x, x), x * (1 - 1 / 8) ** 8)
    # Left end points of a velocity 2t: the sum over i of 2 (i / 4) / 4 = 0.75.
    torch.testing.assert_close(run(plans[4], lambda x, t: 2 * t.expand_as(x), x), x + 0.75)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(sampler, order):
    """dx/dt = t x^2 has the solution 1 / (1 / x0 - t^2 / 2); halving the step divides the error by 2^order."""
    x = torch.linspace(-2, -0.5, 24, dtype=torch.float64).view(2, 4, 3)
    exact = 1 / (1 / x - 1 / 2)

    def error(steps):
        plan = make_plan(FLOW, sampler, steps, "cpu")
        times = torch.tensor([level.signal for level in plan.levels], dtype=torch.float64)
        return (plan.run(lambda x, call: times[call] * x.square(), x) - exact).abs().max().item()

    assert math.log2(error(16) / error(32)) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 6), ("heun", 11), ("rk4", 24)])
def test_calls_and_timesteps_of_flow_plans(sampler, calls):
    plan = make_plan(FlowMatching(FlowMatchingConfig(timestep_scale=1000.0)), sampler, 6, "cpu")
    assert plan.calls == len(plan.timesteps) == calls
    assert plan.clean_timestep == 1000
    assert plan.timesteps.dtype == torch.float32
    expected = {
        "euler": [i / 6 for i in range(6)],
        "heun": [(i + c) / 6 for i in range(5) for c in (0, 1)] + [5 / 6],
        "rk4": [(i + c) / 6 for i in range(6) for c in (0, 0.5, 0.5, 1)],
    }[sampler]
    torch.testing.assert_close(plan.timesteps, 1000 * torch.tensor(expected))


@pytest.mark.parametrize("sampler", ["euler", "heun", "rk4"])
def test_flow_recovers_data_from_a_perfect_network(sampler):
    data, x = 0.9 * torch.tanh(torch.randn(2, 6, 3)), torch.randn(2, 6, 3)
    plan = make_plan(FLOW, sampler, 10, "cpu")
    actual = run(plan, lambda _, t: data - x, x)
    torch.testing.assert_close(actual, data, atol=1e-5, rtol=0)
    for call, level in enumerate(plan.levels):
        t = plan.timesteps[call]
        torch.testing.assert_close(level.clean(t * data + (1 - t) * x, data - x), data)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver++"])
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_diffusion_recovers_data_from_a_perfect_network(sampler, prediction, steps):
    """A network that knows the data: every sampler must arrive at it from any noise."""
    data, x = 0.9 * torch.tanh(torch.randn(2, 6, 3)), torch.randn(2, 6, 3)
    alphas = cosine_alphas_cumprod(100)

    def perfect(x, t):
        alpha_bar = alphas[int(t)]
        epsilon = (x - alpha_bar.sqrt() * data) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * data
        return {"epsilon": epsilon, "sample": data, "v_prediction": v}[prediction]

    plan = make_plan(Diffusion(DiffusionConfig(prediction_type=prediction)), sampler, steps, "cpu")
    atol = 5e-3 if (steps, prediction) == (1, "epsilon") else 1e-4  # one step divides epsilon's rounding by 5e-5
    torch.testing.assert_close(run(plan, perfect, x), data, atol=atol, rtol=0)


def test_clipping_may_be_switched_off():
    far = torch.full((1, 2, 1), 3.0)
    for sampler in ("ddpm", "ddim", "dpm_solver++"):
        for clip, expected in ((1.0, 1.0), (2.0, 2.0), (None, 3.0)):
            config = DiffusionConfig(prediction_type="sample", clip_range=clip)
            plan = make_plan(Diffusion(config), sampler, 5, "cpu")
            assert run(plan, lambda x, t: far, torch.zeros_like(far)).unique().tolist() == [expected]


def test_a_seed_draws_the_start_and_then_one_noise_a_step():
    plan = make_plan(Diffusion(DiffusionConfig()), "ddpm", 3, "cpu")
    x = torch.zeros(2, 5, 4)
    generator = seeded(3)
    expected = torch.stack([torch.randn(2, 5, 4, generator=generator) for _ in range(3)])
    assert torch.equal(draw_step_noise(plan, x, seeded(3)), expected)
    assert plan.step_noise_shape(x.shape) == (3, 2, 5, 4)
    with pytest.raises(ValueError, match=r"step_noise of shape \(3, 2, 5, 4\)"):
        plan.run(lambda x, call: x, x)
    ddim = make_plan(Diffusion(DiffusionConfig()), "ddim", 3, "cpu")
    assert draw_step_noise(ddim, x, None) is None
    with pytest.raises(ValueError, match="step_noise of shape None"):
        ddim.run(lambda x, call: x, x, expected)


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [(Diffusion(DiffusionConfig()), name) for name in ("ddpm", "ddim", "dpm_solver++")]
    + [(FLOW, name) for name in ("euler", "heun", "rk4")],
)
def test_a_prefix_is_seen_at_every_call_and_returned_as_it_is(objective, sampler):
    plan = make_plan(objective, sampler, 4, "cpu")
    x, prefix = torch.randn(2, 6, 3), 0.5 * torch.randn(2, 2, 3)
    seen = []

    def predict(x, call):
        seen.append(x[:, :2].clone())
        return network(x, plan.timesteps[call])

    start = x.clone()
    actions = plan.run(predict, x, draw_step_noise(plan, x, seeded(0)), prefix)
    assert torch.equal(actions[:, :2], prefix)
    assert len(seen) == plan.calls
    assert all(torch.equal(each, prefix) for each in seen)
    assert torch.equal(x, start)
    # The network here works on each step alone, so the others are what they are without a prefix.
    free = run(plan, network, x, seeded(0))
    assert torch.equal(actions[:, 2:], free[:, 2:])
    timesteps = token_timesteps(plan, 1, 2, 6, 2)
    assert timesteps.shape == (2, 6)
    assert timesteps[1].tolist() == [plan.clean_timestep] * 2 + [plan.timesteps[1].item()] * 4


def test_no_sampler_waits_for_the_device():
    """A plan on the meta device has no values at all: any .item() or branch on one would fail."""
    for objective, samplers in (
        (Diffusion(DiffusionConfig()), ("ddpm", "ddim", "dpm_solver++")),
        (FLOW, ("euler", "heun", "rk4")),
    ):
        for sampler in samplers:
            plan = make_plan(objective, sampler, 5, "meta")
            x = torch.empty(2, 6, 3, device="meta")
            step_noise = torch.empty(5, 2, 6, 3, device="meta") if plan.draws_noise else None
            assert plan.run(lambda x, call, t=plan.timesteps: x * t[call], x, step_noise, x[:, :2]).shape == x.shape


def test_a_plan_is_made_once():
    """For as long as the objective is what it was."""
    for objective, sampler in ((Diffusion(DiffusionConfig()), "ddim"), (FlowMatching(FlowMatchingConfig()), "heun")):
        plan = make_plan(objective, sampler, 5, "cpu")
        assert make_plan(objective, sampler, np.int64(5), torch.device("cpu")) is plan
        assert make_plan(objective, sampler, 6, "cpu").steps == 6
        assert make_plan(objective, sampler, 5, "meta").timesteps.device.type == "meta"
        assert make_plan(objective, sampler, 5, "cpu") is plan
        for steps in range(1, 100):
            make_plan(objective, sampler, steps, "cpu")
        assert len(objective.plans) == PLANS
        copied = copy.deepcopy(objective)
        assert len(copied.plans) == 0
        assert len(pickle.loads(pickle.dumps(objective)).plans) == 0
        assert objective.state_dict() == {}
        assert make_plan(copied, sampler, 5, "cpu") is not make_plan(objective, sampler, 5, "cpu")


def test_a_plan_is_made_anew_where_the_objective_changed():
    objective = Diffusion(DiffusionConfig())
    plan = make_plan(objective, "ddim", 5, "cpu")
    objective.config.timestep_spacing = "leading"
    assert make_plan(objective, "ddim", 5, "cpu").timesteps.tolist() == [80, 60, 40, 20, 0]
    objective.config.timestep_spacing = "trailing"
    objective.to(torch.bfloat16)
    coarse = make_plan(objective, "ddim", 5, "cpu")
    assert coarse.levels != plan.levels
    objective.reset_buffers("cpu")
    assert make_plan(objective, "ddim", 5, "cpu").levels == plan.levels
    flow = FlowMatching(FlowMatchingConfig())
    make_plan(flow, "euler", 4, "cpu")
    flow.config.timestep_scale = 1000.0
    assert make_plan(flow, "euler", 4, "cpu").timesteps.tolist() == [0, 250, 500, 750]


def test_a_plan_made_in_inference_mode_serves_outside_of_it():
    objective = FlowMatching(FlowMatchingConfig())
    with torch.inference_mode():
        plan = make_plan(objective, "euler", 2, "cpu")
    weight = torch.ones(1, requires_grad=True)
    (plan.timesteps * weight).sum().backward()
    assert weight.grad.item() == plan.timesteps.sum().item()


def test_guidance_extrapolates_from_the_unconditional():
    conditional, unconditional = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.5])
    assert guide(conditional, unconditional, 1.0).tolist() == [2.0, 1.0]
    assert guide(conditional, unconditional, 0.0).tolist() == [1.0, 1.5]
    assert guide(conditional, unconditional, 3.0).tolist() == [4.0, 0.0]


def test_sampling_is_as_configured_unless_told_otherwise():
    config = PolicyConfig(objective=DiffusionConfig(sampler="ddpm", denoising_steps=7))
    resolved = Sampling().resolve(config)
    assert (resolved.sampler, resolved.denoising_steps, resolved.guidance_scale) == ("ddpm", 7, 1.0)
    resolved = Sampling(sampler="dpm_solver++", denoising_steps=100).resolve(config)
    assert (resolved.sampler, resolved.denoising_steps) == ("dpm_solver++", 100)


def test_all_that_is_wrong_with_a_choice_is_said_at_once():
    config = PolicyConfig(objective=FlowMatchingConfig())
    wrong = Sampling(
        sampler="ddim",
        denoising_steps=1001,
        guidance_scale=2.0,
        candidates=0,
        coherence_decay=1.5,
        joining="glue",
        max_joining_weight=math.inf,
    )
    with pytest.raises(ValueError, match="the policy cannot be sampled like that") as raised:
        wrong.resolve(config)
    for part in (
        "sampler must be one of euler, heun, rk4 (the policy's objective is flow_matching), got 'ddim'",
        "denoising_steps must be 1 to 1000, got 1001",
        "guidance_scale 2.0 needs a policy trained with instruction_dropout",
        "candidates must be a whole number of at least 1, got 0",
        "coherence_decay must be above 0 and at most 1, got 1.5",
        "joining must be one of auto, guided, guided_cheap, prefix, or None; got 'glue'",
        "max_joining_weight must be positive and finite, got inf",
    ):
        assert part in str(raised.value)


def test_numbers_that_are_none_are_refused():
    config = PolicyConfig(objective=FlowMatchingConfig())
    for wrong in (math.nan, math.inf, "2", None, True):
        choices = {"candidates": wrong, "coherence_decay": wrong, "max_joining_weight": wrong}
        with pytest.raises(ValueError, match="cannot be sampled like that") as raised:
            Sampling(guidance_scale=0.0 if wrong is None else wrong, **choices).resolve(config)
        for part in (
            f"candidates must be a whole number of at least 1, got {wrong!r}",
            f"coherence_decay must be above 0 and at most 1, got {wrong!r}",
            f"max_joining_weight must be positive and finite, got {wrong!r}",
        ):
            assert part in str(raised.value)
        assert str(raised.value).count("guidance_scale") == 1
    resolved = Sampling(candidates=np.int64(3), max_joining_weight=np.float32(2), coherence_decay=1).resolve(config)
    assert (resolved.candidates, resolved.max_joining_weight, resolved.coherence_decay) == (3, 2, 1)


@pytest.mark.parametrize("steps", [0, -1, 101, 2.5, True, math.nan])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match="denoising_steps must be 1 to 100"):
        Sampling(denoising_steps=steps).resolve(PolicyConfig(objective=DiffusionConfig()))
    with pytest.raises(ValueError, match="denoising_steps must be 1 to 100"):
        make_plan(Diffusion(DiffusionConfig()), "ddim", steps, "cpu")


@pytest.mark.parametrize("sampler", ["euler", "ddpmm", ""])
def test_samplers_of_another_objective_are_refused(sampler):
    with pytest.raises(ValueError, match=r"sampler must be one of ddpm, ddim, dpm_solver\+\+ "):
        make_plan(Diffusion(DiffusionConfig()), sampler, 5, "cpu")


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_guidance_scales_that_mean_nothing_are_refused(scale):
    with pytest.raises(ValueError, match="guidance_scale must be at least 0 and finite"):
        Sampling(guidance_scale=scale).resolve(PolicyConfig(instruction_dropout=0.1))


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
    assert squared_error(prediction, target, is_pad).mean.item() == 1.0
    assert squared_error(prediction, target, None).mean.item() > 1000
    assert squared_error(prediction, target, torch.ones(2, 3, dtype=torch.bool)).mean.item() == 0.0
