"""Real-time chunking: weights in closed form, guidance against a posterior that is known, and as the policy does it."""

import math

import numpy as np
import pytest
import torch
from policy_fixtures import demo_config, make_batch, make_stats, randomize

from dit_policy_ros.policy.configuration import DiffusionConfig, FlowMatchingConfig, PolicyConfig
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.noise import draw_step_noise
from dit_policy_ros.policy.objectives import FlowMatching, make_objective
from dit_policy_ros.policy.realtime import (
    ChunkInMotion,
    JoinTarget,
    bounded,
    flow_weight,
    guided,
    join_target,
    overlap_weights,
)
from dit_policy_ros.policy.sampling import Sampling, make_plan
from dit_policy_ros.policy.tiny_clip import make_tiny_clip

FLOW = FlowMatchingConfig()
DIFFUSION = DiffusionConfig(clip_range=None)
SAMPLERS = [(FLOW, name) for name in ("euler", "heun", "rk4")] + [
    (DIFFUSION, name) for name in ("ddim", "ddpm", "dpm_solver++")
]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- weights ---


def test_overlap_weights_are_the_papers():
    """arXiv 2506.07339, eq. 5, for H = 8, d = 2, s = 3: c = 3/4, 2/4, 1/4 at steps 2, 3, 4."""
    decay = [c * (math.e**c - 1) / (math.e - 1) for c in (3 / 4, 2 / 4, 1 / 4)]
    assert overlap_weights(8, 2, 3) == pytest.approx([1, 1, *decay, 0, 0, 0])


def test_overlap_weights_at_their_limits():
    assert overlap_weights(6, 0, 6) == [0.0] * 6
    assert overlap_weights(6, 2, 4) == [1, 1, 0, 0, 0, 0]
    soft = overlap_weights(16, 3, 8)
    assert soft == sorted(soft, reverse=True)
    assert soft[:3] == [1] * 3
    assert soft[8:] == [0] * 8
    assert 0 < soft[7] < soft[3] < 1


def test_weights_of_guidance_are_the_papers():
    """(1 - t) / (t r^2) at t = 1/2 is 2, at 1/4 and 3/4 it is 10/3; infinite at 0 and 1."""
    assert [flow_weight(t, 5.0) for t in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([5, 10 / 3, 2, 10 / 3, 5])
    assert flow_weight(0.25, 3.0) == 3.0


def test_a_change_is_shortened_to_its_bound():
    change, pull = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    change[0, 0], change[1, 1] = torch.tensor([30.0, 40.0]), torch.tensor([3.0, 4.0])
    pull[:, 0, 1] = 2.0
    assert bounded(change, pull, 5.0)[0, 0].tolist() == [6.0, 8.0]
    assert torch.equal(bounded(change, pull, 5.0)[1], change[1])
    assert torch.equal(bounded(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 5.0), torch.zeros(1, 2, 2))


# --- guidance ---


def gaussian_network(plan, covariance):
    """The exact network for chunks whose steps are Gaussian with that covariance, (T, T), each dimension alone."""
    identity = torch.eye(len(covariance))

    def predict(x, call):
        level = plan.levels[call]
        if level.noise == 0:
            return torch.zeros_like(x)  # at t = 1, which only the last stage of rk4 visits
        gain = level.signal * covariance @ torch.linalg.inv(level.signal**2 * covariance + level.noise**2 * identity)
        clean = torch.einsum("ij,bja->bia", gain, x)
        return (
            (clean - x) / level.noise
            if plan.sampler in ("euler", "heun", "rk4")
            else (x - level.signal * clean) / level.noise
        )

    return predict


def joined(plan, network, target, cheap=False, max_weight=5.0, batch=64):
    x = torch.randn(batch, *target.actions.shape[1:], generator=seeded(1))
    network = guided(network, plan, target, max_weight, cheap)
    return plan.run(network, x, draw_step_noise(plan, x, seeded(2)))


def hard_target(values, committed):
    """The first steps committed, the others free."""
    weights = [1.0] * committed + [0.0] * (values.shape[1] - committed)
    return JoinTarget(values.expand(64, -1, -1), tuple(weights), committed, "guided")


@pytest.mark.parametrize(
    ("objective", "sampler", "cheap"),
    [
        (FLOW, "euler", False),  # cheap, flow matching's Jacobian is not the exact one: the next test but one
        (DIFFUSION, "ddim", False),
        (DIFFUSION, "ddpm", False),
        (DIFFUSION, "ddim", True),
        (DIFFUSION, "ddpm", True),
    ],
)
def test_guidance_is_exact_where_the_data_is_standard_normal(objective, sampler, cheap):
    """The assumption of PiGDM holds: every estimate is replaced, and the rest is what it is without guidance."""
    plan = make_plan(make_objective(objective), sampler, 10, "cpu")
    values = torch.randn(1, 8, 2, generator=seeded(0))
    network = gaussian_network(plan, torch.eye(8))
    actions = joined(plan, network, hard_target(values, 3), cheap, max_weight=1e4)
    torch.testing.assert_close(actions[:, :3], values[:, :3].expand(64, -1, -1), atol=1e-4, rtol=0)
    free = joined(plan, network, hard_target(values, 0), cheap)
    torch.testing.assert_close(actions[:, 3:], free[:, 3:])


def test_cheap_guidance_of_flow_matching_in_closed_form():
    """At a fixed v the estimate c = x + (1 - t) v moves as x does: v' = v + weight W (Y - c), the weight by hand."""
    plan = make_plan(make_objective(FLOW), "euler", 4, "cpu")
    x, values, velocity = torch.randn(3, 2, 3, 2, generator=seeded(0))
    target = JoinTarget(values, (1.0, 0.5, 0.0), 1, "guided_cheap")
    network = guided(lambda x, call: velocity, plan, target, 3.0, cheap=True)
    for call, (t, weight) in enumerate([(0, 3.0), (0.25, 3.0), (0.5, 2.0), (0.75, 3.0)]):  # 10/3 is above the bound
        pull = torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1) * (values - x - (1 - t) * velocity)
        torch.testing.assert_close(network(x, call), velocity + weight * pull)


@pytest.mark.parametrize(("objective", "sampler"), SAMPLERS)
def test_guidance_brings_the_rest_along(objective, sampler):
    """Steps that hang together (a smooth Gaussian process): the mean of the free ones given the committed is known.

    No guidance of this kind is exact there. With the Jacobian the first steps must come within a tenth of their
    distance, and the free ones a third of the way to their conditional mean; the cheap variant holds the first steps
    as well, but brings the rest along less.
    """
    steps, committed = 12, 4
    time = torch.arange(steps).float()
    covariance = torch.exp(-0.5 * ((time[:, None] - time) / 4) ** 2) + 1e-3 * torch.eye(steps)
    values = torch.zeros(1, steps, 2)
    values[:, :committed] = (torch.linalg.cholesky(covariance) @ torch.randn(1, steps, 2, generator=seeded(4)))[
        :, :committed
    ]
    conditional = (
        covariance[committed:, :committed]
        @ torch.linalg.inv(covariance[:committed, :committed])
        @ values[:, :committed]
    )
    plan = make_plan(make_objective(objective), sampler, 20, "cpu")
    network = gaussian_network(plan, covariance)

    def errors(committed_steps, cheap):
        actions = joined(plan, network, hard_target(values, committed_steps), cheap)
        held = (actions[:, :committed] - values[:, :committed]).square().mean().sqrt()
        rest = (actions[:, committed:].mean(dim=0) - conditional).square().mean().sqrt()
        return held.item(), rest.item()

    free, exact, cheap = errors(0, False), errors(committed, False), errors(committed, True)
    assert exact[0] < 0.1 * free[0]
    assert cheap[0] < 0.1 * free[0]
    assert exact[1] < 0.7 * free[1]
    assert cheap[1] > 1.15 * exact[1]


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [(FLOW, "euler")]
    + [
        (DiffusionConfig(prediction_type=prediction, clip_range=None), "ddim")
        for prediction in ("epsilon", "sample", "v_prediction")
    ],
)
def test_guidance_uses_the_true_jacobian(objective, sampler):
    """J^T W (Y - c), J by central differences of a network that mixes the steps, in float64."""
    plan = make_plan(make_objective(objective), sampler, 5, "cpu")
    mix = torch.randn(6, 6, generator=seeded(0), dtype=torch.float64) / 3

    def network(x, call):
        return torch.sin(mix @ x.view(-1, 6, 1) + call).view(x.shape)

    x, values = torch.randn(2, 1, 3, 2, generator=seeded(1), dtype=torch.float64)
    weights = (1.0, 0.5, 0.0)
    for call in (1, 3):
        level = plan.levels[call]

        def clean(x, level=level, call=call):
            return level.clean(x, network(x, call)).flatten()

        step = 1e-6
        jacobian = torch.stack(
            [(clean(x + step * e) - clean(x - step * e)) / (2 * step) for e in torch.eye(6).double().view(6, 1, 3, 2)],
            dim=1,
        )
        pull = torch.tensor(weights).view(1, 3, 1) * (values - clean(x).view(x.shape))
        expected = (jacobian.T @ pull.flatten()).view(x.shape)
        out, limit = network(x, call), 1e9
        guided_out = guided(network, plan, JoinTarget(values, weights, 0, "guided"), limit, cheap=False)(x, call)
        if objective is FLOW:
            torch.testing.assert_close(
                guided_out - out, flow_weight(level.signal, limit) * expected, atol=1e-8, rtol=1e-6
            )
        else:
            # The clean estimate moves by 1 / a times that, whatever the network predicts.
            moved = level.clean(x, guided_out) - clean(x).view(x.shape)
            torch.testing.assert_close(moved, expected / level.signal, atol=1e-8, rtol=1e-6)


# --- as the policy does it ---


@pytest.fixture(scope="module")
def make_policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_clip")
    make_tiny_clip(folder)

    def make(objective=None, **changes):
        config = demo_config(str(folder), objective=objective or FlowMatchingConfig(denoising_steps=4), **changes)
        torch.manual_seed(0)
        policy = MultitaskDiTPolicy(config, make_stats(config)).eval()
        randomize(policy.noise_predictor)
        return policy

    return make


OBJECTIVES = [FlowMatchingConfig(denoising_steps=4), DiffusionConfig(denoising_steps=4)]


def chunk(policy, noise, motion=None, **choices):
    batch = make_batch(policy.config, len(noise))
    return policy.predict_chunk(batch, Sampling(**choices), noise, motion=motion)


def test_the_chunk_in_motion_in_the_models_space(make_policy):
    """Relative to the newest joints, normalised; past and missing rows are zero and weigh nothing."""
    policy = make_policy(n_obs_steps=3, max_delay=4)
    actions = 0.1 * torch.randn(1, 6, 7)
    motion = ChunkInMotion(actions, delay=2, execution_horizon=5, past=torch.full((1, 2, 7), 0.2))
    origin = torch.randn(2, 1, 7)
    target = join_target(motion, policy.config, 2, lambda a: policy.action_normalizer(a - origin), "prefix")
    stats = make_stats(policy.config)["action"]
    low, high = (torch.tensor(stats[name]) for name in ("min", "max"))
    expected = 2 * (actions - origin - low) / (high - low) - 1
    torch.testing.assert_close(target.actions[:, 2:8], expected)
    torch.testing.assert_close(target.actions[:, :2], (2 * (0.2 - origin - low) / (high - low) - 1).expand(-1, 2, -1))
    assert not target.actions[:, 8:].any()
    # The chunk's 14 rows from now on, of which 6 are known.
    assert target.weights == (0.0, 0.0, *overlap_weights(14, 2, 5)[:6], *[0.0] * 8)
    assert (target.prefix_steps, target.joining) == (4, "prefix")
    torch.testing.assert_close(target.prefix, target.actions[:, :4])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("joining", ["guided", "guided_cheap"])
def test_nothing_committed_and_no_overlap_changes_nothing(make_policy, objective, joining):
    policy, noise = make_policy(objective), torch.randn(2, 16, 7)
    motion = ChunkInMotion(torch.randn(1, 16, 7), delay=0, execution_horizon=16)
    assert torch.equal(chunk(policy, noise, motion, joining=joining), chunk(policy, noise))


class StandardNormal(torch.nn.Module):
    """The exact network for actions that are standard normal in the model's space, whatever the observation."""

    def __init__(self, objective):
        super().__init__()
        self.output_proj = torch.nn.Linear(1, 1)  # where a policy looks for its device
        self.objective = objective

    def forward(self, x, timestep, conditioning):
        t = timestep.view(-1, 1, 1)
        if isinstance(self.objective, FlowMatching):
            return (2 * t - 1) / (t.square() + (1 - t).square()) * x
        return (1 - self.objective.alphas_cumprod[t.long()]).sqrt() * x


@pytest.mark.parametrize(
    ("objective", "joining"),
    [
        (FlowMatchingConfig(denoising_steps=5), "guided"),
        (DiffusionConfig(denoising_steps=5), "guided"),
        (DiffusionConfig(denoising_steps=10, sampler="dpm_solver++"), "guided"),
        (DiffusionConfig(denoising_steps=5), "guided_cheap"),
        (DiffusionConfig(denoising_steps=5, sampler="ddpm"), "guided_cheap"),
    ],
)
def test_committed_steps_are_held(make_policy, objective, joining):
    """Where the estimate's Jacobian is known to be exact, the chunk has the committed steps, to 1e-4 of their range."""
    policy, noise = make_policy(objective), torch.randn(2, 16, 7)
    policy.noise_predictor = StandardNormal(policy.objective)
    origin = make_batch(policy.config, 2)["observation.state"][:, -1:]
    values = policy.action_normalizer.undo(torch.rand(2, 9, 7) * 1.8 - 0.9) + origin
    actions = chunk(policy, noise, ChunkInMotion(values, delay=4, execution_horizon=8), joining=joining)
    off = policy.action_normalizer(actions - origin) - policy.action_normalizer(chunk(policy, noise) - origin)
    held = (policy.action_normalizer(actions[:, :4] - origin) - policy.action_normalizer(values[:, :4] - origin)).abs()
    assert held.max() < 1e-4
    assert off[:, 4:8].abs().mean() > 0.01  # the next ones are pulled, the last ones are free
    if objective.sampler != "ddpm":
        torch.testing.assert_close(off[:, 8:], torch.zeros(2, 8, 7), atol=1e-4, rtol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_guidance_works_whatever_mode_the_caller_is_in(make_policy, objective):
    policy, noise = make_policy(objective), torch.randn(2, 16, 7)
    motion = ChunkInMotion(torch.randn(2, 12, 7), delay=3, execution_horizon=4)
    plain = chunk(policy, noise, motion)
    with torch.inference_mode():
        assert torch.equal(chunk(policy, noise.clone(), motion), plain)
    with torch.no_grad():
        assert torch.equal(chunk(policy, noise, motion), plain)
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert not plain.requires_grad


def test_a_policy_made_in_inference_mode_cannot_be_differentiated(make_policy):
    """And says so; the ways that differentiate nothing are open to it."""
    with torch.inference_mode():
        policy = make_policy(max_delay=4)
    noise, motion = torch.randn(1, 16, 7), ChunkInMotion(torch.randn(1, 12, 7), delay=3, execution_horizon=4)
    with pytest.raises(ValueError, match="which was built in torch"):
        chunk(policy, noise, motion, joining="guided")
    for joining in ("guided_cheap", "prefix"):
        assert chunk(policy, noise, motion, joining=joining).isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("n_obs_steps", [1, 2])
def test_a_prefix_is_returned_exactly_and_costs_nothing(make_policy, objective, n_obs_steps):
    policy, noise = make_policy(objective, n_obs_steps=n_obs_steps, max_delay=5), torch.randn(2, 16, 7)
    calls = []
    policy.noise_predictor.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    batch = make_batch(policy.config, 2)
    origin = batch["observation.state"][:, -1:]
    motion = ChunkInMotion(origin + 0.1 * torch.randn(2, 8, 7), 3, 6, past=origin.repeat(1, n_obs_steps - 1, 1))
    actions = policy.predict_chunk(batch, Sampling(joining="prefix"), noise, motion=motion)
    torch.testing.assert_close(actions[:, :3], motion.actions[:, :3], atol=1e-6, rtol=0)
    known = n_obs_steps - 1 + 3
    assert len(calls) == 4
    clean = policy.objective.clean_timestep
    for x, timestep, _ in calls:
        assert timestep.shape == (2, 16)
        assert (timestep[:, :known] == clean).all()
        assert (timestep[:, known:] == timestep[0, -1]).all()
        torch.testing.assert_close(
            x[:, n_obs_steps - 1 : known], policy.action_normalizer(motion.actions[:, :3] - origin)
        )
    assert not torch.equal(actions[:, 3:], policy.predict_chunk(batch, noise=noise)[:, 3:])
    nothing = ChunkInMotion(motion.actions, delay=0, execution_horizon=6, past=motion.past)
    free = policy.predict_chunk(batch, Sampling(joining="prefix"), noise, motion=nothing)
    assert torch.equal(free, policy.predict_chunk(batch, noise=noise))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("changes", "delay", "knows_past", "way"),
    [
        ({}, 3, False, "guided_cheap"),  # never trained with committed steps
        ({"max_delay": 3}, 3, False, "prefix"),
        ({"max_delay": 2}, 3, False, "guided_cheap"),  # trained with fewer
        ({"max_delay": 3, "n_obs_steps": 2}, 3, True, "prefix"),
        ({"max_delay": 3, "n_obs_steps": 2}, 3, False, "guided_cheap"),  # its chunks begin with the unknown past
    ],
)
def test_unless_told_otherwise_the_best_way_that_can_be_had_is_taken(
    make_policy, objective, changes, delay, knows_past, way
):
    policy, noise = make_policy(objective, **changes), torch.randn(2, 16, 7)
    origin = make_batch(policy.config, 2)["observation.state"][:, -1:]
    past = origin.expand(-1, policy.config.n_obs_steps - 1, -1) if knows_past else None
    motion = ChunkInMotion(origin + 0.1 * torch.randn(2, 9, 7), delay, 5, past)
    chosen = chunk(policy, noise, motion)
    assert torch.equal(chosen, chunk(policy, noise, motion, joining="auto"))
    assert torch.equal(chosen, chunk(policy, noise, motion, joining=way))
    assert not torch.allclose(chosen, chunk(policy, noise, motion, joining="guided"), atol=1e-3)
    assert not torch.allclose(chosen, chunk(policy, noise), atol=1e-3)


def test_arrays_and_numpys_integers_are_as_good_as_tensors_and_ints(make_policy):
    policy, noise = make_policy(max_delay=4, n_obs_steps=2), torch.randn(4, 16, 7)
    actions, past = 0.1 * torch.randn(2, 9, 7), torch.zeros(1, 1, 7)
    for joining in ("guided", "guided_cheap", "prefix"):
        sampling = Sampling(candidates=2, denoising_steps=3, joining=joining)
        plain = policy.predict_chunk(
            make_batch(policy.config, 2), sampling, noise, motion=ChunkInMotion(actions, 3, 6, past)
        )
        motion = ChunkInMotion(actions.numpy(), np.int64(3), np.int32(6), past.numpy())
        sampling = Sampling(candidates=np.int64(2), denoising_steps=np.int16(3), joining=joining)
        actual = policy.predict_chunk(make_batch(policy.config, 2), sampling, noise.numpy(), motion=motion)
        assert torch.equal(actual, plain)
    with pytest.raises(ValueError, match="the chunk in motion's actions is no tensor or array of numbers but a str"):
        ChunkInMotion("left", 3, 6)


def test_candidates_and_guidance_by_the_instruction_go_with_it(make_policy):
    policy = make_policy(instruction_dropout=0.1, max_delay=4)
    randomize(policy.observation_encoder, keep=lambda name: "text_encoder.text_encoder" in name)
    batch, noise = make_batch(policy.config, 2), torch.randn(6, 16, 7)
    motion = ChunkInMotion(0.2 * torch.randn(1, 9, 7) + batch["observation.state"][:, -1:], 2, 8)
    for joining in ("guided", "guided_cheap", "prefix"):
        sampling = Sampling(candidates=3, guidance_scale=2.0, joining=joining)
        candidates = policy.predict_candidates(batch, sampling, noise, motion=motion)
        assert candidates.shape == (2, 3, 16, 7)
        one = Sampling(guidance_scale=2.0, joining=joining)
        for number in range(3):
            alone = policy.predict_chunk(batch, one, noise[[number, 3 + number]], motion=motion)
            torch.testing.assert_close(candidates[:, number], alone, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(
            candidates, policy.predict_candidates(batch, Sampling(candidates=3, joining=joining), noise, motion=motion)
        )


def test_guidance_by_the_instruction_needs_both_conditionings(make_policy):
    policy = make_policy(instruction_dropout=0.1)
    batch, noise = make_batch(policy.config, 1), torch.randn(1, 16, 7)
    with_words, without = policy.encode(batch), policy.encode(batch, without_instruction=True)
    with pytest.raises(ValueError, match="needs `unconditional`"):
        policy.sample(with_words, Sampling(guidance_scale=2.0), noise)
    # One Euler step: the sample is linear in the velocity, so guidance is the same combination of the samples.
    samples = [policy.sample(each, Sampling(denoising_steps=1), noise) for each in (with_words, without)]
    expected = samples[1] + 2.5 * (samples[0] - samples[1])
    actual = policy.sample(with_words, Sampling(denoising_steps=1, guidance_scale=2.5), noise, unconditional=without)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": torch.full((1, 9, 7), math.nan)}, "actions is not finite: nan in sample 0, row 0, dimension 0"),
        ({"actions": torch.zeros(1, 9, 6)}, r"actions has shape \(1, 9, 6\), the policy and the batch need \(2 or 1"),
        ({"actions": torch.zeros(3, 9, 7)}, r"actions has shape \(3, 9, 7\)"),
        ({"actions": torch.zeros(9, 7)}, r"actions has shape \(9, 7\)"),
        (
            {"actions": torch.zeros(1, 9, 7, dtype=torch.int64)},
            "actions must be floating point, in units, got torch.int64",
        ),
        ({"actions": torch.zeros(1, 17, 7)}, "actions has 17 rows, a chunk has 16"),
        ({"delay": 2.5}, "delay and execution_horizon are whole numbers of steps, got 2.5 and 8"),
        ({"delay": "2"}, "delay and execution_horizon are whole numbers of steps, got '2' and 8"),
        ({"delay": torch.tensor(2)}, r"whole numbers of steps, got tensor\(2\) and 8"),
        ({"delay": -1}, "delay must be 0 to 9, the number of rows of actions; got -1"),
        ({"delay": 10}, "delay must be 0 to 9"),
        ({"execution_horizon": 0}, r"execution_horizon must be 1 to 14 \(the chunk's 16 steps without the delay's 2\)"),
        ({"execution_horizon": 15}, "execution_horizon must be 1 to 14"),
        ({"delay": np.bool_(True)}, "delay and execution_horizon are whole numbers of steps, got .*True.* and 8"),
        ({"past": torch.zeros(1, 1, 7)}, r"past has shape \(1, 1, 7\), the policy and the batch need \(2 or 1, 0, 7\)"),
    ],
)
def test_motions_that_do_not_fit_are_refused(make_policy, changes, message):
    settings = {"actions": torch.zeros(1, 9, 7), "delay": 2, "execution_horizon": 8}
    motion = ChunkInMotion(**(settings | changes))
    with pytest.raises(ValueError, match=message):
        chunk(make_policy(), torch.randn(2, 16, 7), motion)


def test_a_prefix_needs_a_policy_trained_for_it(make_policy):
    motion = ChunkInMotion(torch.zeros(1, 9, 7), delay=4, execution_horizon=8)
    noise = torch.randn(2, 16, 7)
    with pytest.raises(ValueError, match="needs a policy trained with max_delay above 0; use joining 'auto'"):
        chunk(make_policy(), noise, motion, joining="prefix")
    with pytest.raises(ValueError, match="delay 4 exceeds max_delay 3"):
        chunk(make_policy(max_delay=3), noise, motion, joining="prefix")
    with pytest.raises(ValueError, match="needs `past`, the 1 actions before the newest observation"):
        chunk(make_policy(max_delay=4, n_obs_steps=2), noise, motion, joining="prefix")


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (torch.zeros(2, 15, 7), r"noise must have the shape \(2, 16, 7\)"),
        (torch.zeros(2, 16, 7, dtype=torch.int64), "noise must be floating point, standard normal, got torch.int64"),
        (torch.full((2, 16, 7), math.inf), "noise must be finite, got 224 values that are not"),
    ],
)
def test_noise_that_cannot_be_meant_is_refused(make_policy, noise, message):
    with pytest.raises(ValueError, match=message):
        chunk(make_policy(), noise)


def test_defaults_of_the_configuration_sample():
    """The library's own defaults are choices the samplers follow."""
    for objective in (DiffusionConfig(), FlowMatchingConfig()):
        config = PolicyConfig(objective=objective)
        resolved = Sampling().resolve(config)
        assert make_plan(make_objective(objective), resolved.sampler, resolved.denoising_steps, "cpu").calls == 10
