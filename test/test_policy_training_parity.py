"""Training is LeRobot's `multi_task_dit`, number for number: same weights, batch, noise and timesteps, same step.

Their loss is theirs (`policy.forward`), their step their `update_policy`'s: gradients cut, Adam, their schedule.
Not compared is what either draws in its own order: crops, dropout. What differs is the warm-up, which begins at 0 there
and at 1/warmup_steps here.
"""

import pytest
import torch
from accelerate import Accelerator
from dit_policy_training.loop.optimization import Rates, make_optimizer, scaled_step
from dit_policy_training.loop.options import OptimizerConfig, SchedulerConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.scripts.lerobot_train import update_policy
from lerobot.utils.logging_utils import AverageMeter, MetricsTracker
from lerobot_fixtures import ACTIONS, HORIZON, make_clip, make_observations, their_config, their_policy, their_stats
from test_policy_parity import same_policy

from dit_policy_ros.policy.draws import Draws
from dit_policy_ros.policy.interop import tensor_names

BATCH = 6
OBJECTIVES = {
    "diffusion": {"objective": "diffusion"},
    "diffusion, sample": {"objective": "diffusion", "prediction_type": "sample"},
    "flow matching, beta": {"objective": "flow_matching", "timestep_sampling_strategy": "beta"},
    "flow matching, uniform": {"objective": "flow_matching", "timestep_sampling_strategy": "uniform"},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


class TheirDraws(Draws):
    """The noise, then the timesteps, as LeRobot draws them from a seed."""

    def __init__(self, config, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.noise = torch.randn(BATCH, HORIZON, ACTIONS)
        if config.is_diffusion:
            self.times = torch.randint(0, config.num_train_timesteps, (BATCH,))
        elif config.timestep_sampling_strategy == "uniform":
            self.times = torch.rand(BATCH)
        else:
            distribution = torch.distributions.Beta(config.timestep_sampling_alpha, config.timestep_sampling_beta)
            self.times = distribution.sample((BATCH,))

    def normal(self, shape, device):
        assert shape == tuple(self.noise.shape)
        return self.noise

    def uniform(self, shape, device):
        return self.times

    def beta(self, alpha, beta, shape, device):
        return self.times

    def integers(self, low, end, shape, device):
        # A window that is not random: its shift is drawn from 0 to 0.
        return torch.zeros(shape, dtype=torch.int64) if end - low == 1 else self.times


class Pair:
    """The same policy twice, in training mode, and a batch with padding."""

    def __init__(self, clip, **changes):
        settings = {"dropout": 0.0, "image_crop_is_random": False} | changes
        self.config = their_config(clip, **settings)
        self.theirs = their_policy(self.config).train()
        self.ours = same_policy(self.theirs, their_stats()).train()
        self.batch = make_observations(self.config, BATCH)
        generator = torch.Generator().manual_seed(3)
        self.batch["action"] = torch.randn(BATCH, HORIZON, ACTIONS, generator=generator)
        self.batch["action_is_pad"] = torch.rand(BATCH, HORIZON, generator=generator) > 0.6
        self._before, _ = make_pre_post_processors(self.config, dataset_stats=their_stats())

    def their_batch(self):
        return self._before(dict(self.batch))

    def losses(self, seed=7):
        """Theirs and ours."""
        torch.manual_seed(seed)
        theirs, _ = self.theirs.forward(self.their_batch())
        return theirs, self.ours.loss(self.batch, TheirDraws(self.config, seed))

    def renamed(self, tensors):
        return tensor_names.from_lerobot(tensors)[0]

    def their_gradients(self):
        return self.renamed({name: p.grad for name, p in self.theirs.named_parameters() if p.grad is not None})

    def trainable(self):
        return {name: p for name, p in self.ours.named_parameters() if p.requires_grad}


def total_norm(tensors):
    return torch.nn.utils.get_total_norm(list(tensors)).item()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_every_gradient_are_lerobots(clip, objective, separate, masked):
    changes = OBJECTIVES[objective] | {"use_separate_rgb_encoder_per_camera": separate}
    pair = Pair(clip, do_mask_loss_for_padding=masked, **changes)
    theirs, ours = pair.losses()
    theirs.backward()
    ours.backward()
    assert 0.1 < theirs.item() < 10
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    expected, actual = pair.their_gradients(), {name: p.grad for name, p in pair.trainable().items()}
    assert set(actual) == set(expected)
    largest = max((actual[name] - expected[name]).abs().max().item() for name in expected)
    assert largest < 1e-5
    relative = total_norm(actual[name] - expected[name] for name in expected) / total_norm(expected.values())
    assert relative < 1e-5
    for part in ("vision_encoders", "text_encoder.projection", "adaLN_modulation", "time_mlp", "attn.qkv_proj"):
        assert max(expected[name].abs().max() for name in expected if part in name) > 1e-4, part


def test_with_and_without_the_mask_the_loss_is_another(clip):
    """That is, the batch's padding is such that the comparison above tells."""
    masked, all_of_it = (Pair(clip, do_mask_loss_for_padding=choice).losses()[0].item() for choice in (True, False))
    assert abs(masked - all_of_it) > 1e-3


def their_tracker():
    meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")}
    return MetricsTracker(BATCH, 100, 1, meters)


@pytest.mark.parametrize("grad_clip", [10.0, 0.1])  # theirs, and one that cuts
@pytest.mark.parametrize("objective", ["diffusion", "flow matching, beta"])
def test_an_optimizer_step_is_lerobots(clip, objective, grad_clip):
    """Two steps along the schedule, theirs by their update_policy, ours by the trainer's own functions.

    Adam divides a gradient by its size: where that is rounding error alone (the keys' biases, which change no
    softmax), so is the step. Ours therefore takes their gradients, which the test above compares with its own.
    """
    steps, lr = 10, 1e-3
    pair = Pair(clip, optimizer_lr=lr, do_mask_loss_for_padding=True, **OBJECTIVES[objective])
    their_optimizer = pair.config.get_optimizer_preset().build(pair.theirs.get_optim_params())
    their_schedule = pair.config.get_scheduler_preset().build(their_optimizer, steps)
    preset = pair.config.get_optimizer_preset()
    optimizer = make_optimizer(
        OptimizerConfig("adam", lr, preset.betas, preset.eps, preset.weight_decay, grad_clip), pair.ours
    )
    rates = Rates(SchedulerConfig("cosine", warmup_steps=0), optimizer, steps)
    start = {name: p.detach().clone() for name, p in pair.trainable().items()}
    seen = {}
    for hooked in pair.theirs.parameters():
        if hooked.requires_grad:
            hooked.register_post_accumulate_grad_hook(lambda p: seen.__setitem__(p, p.grad.clone()))
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    tracker = their_tracker()
    for step in range(2):
        torch.manual_seed(step)
        seen.clear()
        update_policy(tracker, pair.theirs, pair.their_batch(), their_optimizer, grad_clip, accelerator, their_schedule)
        given = pair.renamed({name: seen[p] for name, p in pair.theirs.named_parameters() if p in seen})
        rates.set(step)
        for name, parameter in pair.trainable().items():
            parameter.grad = given[name]
        norm = scaled_step(optimizer, torch.ones(()), grad_clip)
        assert norm.item() == pytest.approx(tracker.grad_norm.val, rel=1e-5)
        assert (norm > grad_clip) == (grad_clip == 0.1)
        expected = pair.renamed(pair.theirs.state_dict())
        for name, parameter in pair.trainable().items():
            torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=0, msg=name)
    moved = {name: (p - start[name]).abs().max().item() for name, p in pair.trainable().items()}
    vision = {name for name in moved if ".vision_encoders." in name}
    assert max(moved[name] for name in vision) == pytest.approx(2e-4, rel=0.1)  # lr_multiplier is 0.1 on both sides
    assert max(moved[name] for name in moved if name not in vision) == pytest.approx(2e-3, rel=0.1)


def test_the_rates_after_the_warmup_are_lerobots_and_the_warmup_is_one_step_ahead(clip):
    steps, warmup = 20, 5
    config = their_config(clip, scheduler_warmup_steps=warmup)
    group = [torch.nn.Parameter(torch.zeros(1))]
    their_optimizer, optimizer = (torch.optim.Adam(group, lr=1.0) for _ in range(2))
    schedule = config.get_scheduler_preset().build(their_optimizer, steps)
    theirs = []
    for _ in range(steps):
        theirs.append(schedule.get_last_lr()[0])
        their_optimizer.step()
        schedule.step()
    rates = Rates(SchedulerConfig("cosine", warmup), optimizer, steps)
    ours = [rates.set(step) for step in range(steps)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-7)
    assert ours[: warmup - 1] == pytest.approx(theirs[1:warmup], abs=1e-7)
    assert (theirs[0], ours[0]) == (0.0, 1 / warmup)
