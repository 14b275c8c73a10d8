"""The loss's random numbers: a part of a batch gets exactly those that the whole would have got, and no others."""

import pytest
import torch
from policy_fixtures import demo_config, make_batch, make_stats, randomize

from dit_policy_ros.policy.configuration import DiffusionConfig, FlowMatchingConfig
from dit_policy_ros.policy.draws import Draws
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.tiny_clip import make_tiny_clip

CPU = torch.device("cpu")
KINDS = {
    "normal": lambda draws, count: draws.normal((count, 3), CPU),
    "uniform": lambda draws, count: draws.uniform((count, 2), CPU),
    "integers": lambda draws, count: draws.integers(-5, 100, (count,), CPU),
    "beta": lambda draws, count: draws.beta(1.5, 1.0, (count,), CPU),
}


def seeded(rows=None, total=None, seed=4):
    return Draws(torch.Generator().manual_seed(seed), rows, total)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeats", [1, 3])
def test_parts_get_the_numbers_of_the_whole(kind, repeats):
    def two_calls(draws, count):
        repeated = draws.repeated(repeats)
        return [KINDS[kind](draws, count), KINDS[kind](repeated, count * repeats)]  # the second's state is the first's

    whole = two_calls(seeded(), 10)
    parts = [two_calls(seeded(slice(*part), 10), part[1] - part[0]) for part in ((0, 3), (3, 4), (4, 10))]
    for index, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), expected)
        assert len(expected.unique()) > 5


def test_without_a_generator_numbers_are_torchs_own():
    torch.manual_seed(1)
    expected = torch.randn(4, 3), torch.rand(4, 2), torch.randint(-5, 100, (4,))
    expected += (torch.distributions.Beta(1.5, 1.0).sample((4,)),)
    torch.manual_seed(1)
    for kind, numbers in zip(KINDS, expected, strict=True):
        assert torch.equal(KINDS[kind](Draws(), 4), numbers)


def test_beta_has_the_mean_and_the_variance_of_beta():
    drawn = seeded().beta(1.5, 1.0, (40000,), CPU)
    assert drawn.mean().item() == pytest.approx(0.6, abs=0.01)
    assert drawn.var().item() == pytest.approx(1.5 / (2.5**2 * 3.5), abs=0.005)


@pytest.mark.parametrize(
    ("rows", "total"), [(slice(0, 2), None), (None, 4), (slice(0, 4, 2), 4), (slice(2, 5), 4), (slice(3, 2), 4)]
)
def test_rows_that_are_no_part_are_refused(rows, total):
    with pytest.raises(ValueError, match="rows"):
        Draws(None, rows, total)


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(ValueError, match="draws are for 2 rows of 6, the batch has 3"):
        seeded(slice(0, 2), 6).normal((3, 1), CPU)


@pytest.fixture(scope="module", params=["flow matching", "diffusion"])
def policy(request, tmp_path_factory):
    """Everything random at once, in training mode."""
    folder = tmp_path_factory.mktemp("tiny_clip")
    make_tiny_clip(folder)
    objective = {"flow matching": FlowMatchingConfig(noise_draws=3), "diffusion": DiffusionConfig(noise_draws=3)}
    config = demo_config(
        str(folder), objective=objective[request.param], state_noise=0.1, instruction_dropout=0.5, max_delay=3
    )
    vision = config.observation_encoder.vision
    vision.resize_shape, vision.crop_shape = (72, 72), (64, 64)
    vision.brightness = vision.contrast = vision.saturation = vision.hue = 0.2
    torch.manual_seed(0)
    policy = MultitaskDiTPolicy(config, make_stats(config)).train()
    randomize(policy.noise_predictor)
    return policy


def cut(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


def test_the_loss_is_the_sum_of_its_parts(policy):
    batch = make_batch(policy.config, 6)
    batch["action_is_pad"][4:, 7:] = True  # the parts count different numbers of elements

    def terms(batch, rows=None, total=None, seed=4):
        with torch.no_grad():
            return policy.loss_terms(batch, seeded(rows, total, seed))

    whole = terms(batch)
    parts = [terms(cut(batch, rows), rows, 6) for rows in (slice(0, 1), slice(1, 6))]
    assert sum(part.count.item() for part in parts) == whole.count.item()
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-5)
    assert whole.mean.item() == pytest.approx(whole.total.item() / whole.count.item())
    assert terms(batch, seed=5).total.item() != pytest.approx(whole.total.item(), rel=1e-3)
    # Every kind of draw counts: the second part with the draws of the first rows is another number.
    assert terms(cut(batch, slice(1, 6)), slice(0, 5), 6).total.item() != pytest.approx(parts[1].total.item(), rel=1e-3)


def test_forward_is_the_loss_terms_and_loss_their_mean(policy):
    batch = make_batch(policy.config, 2)
    total, count = policy(batch, seeded())
    assert torch.equal(policy.loss(batch, seeded()), total / count)


def test_nothing_of_a_loss_is_drawn_from_elsewhere(policy):
    """With a generator given, torch's own is not touched."""
    batch = make_batch(policy.config, 2)
    before = torch.get_rng_state()
    policy.loss(batch, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_shards_of_a_batch_give_the_gradients_of_the_whole(policy):
    batch = make_batch(policy.config, 4)

    def gradients(parts):
        policy.zero_grad()
        terms = [policy.loss_terms(cut(batch, rows), seeded(rows, 4)) for rows in parts]
        count = sum(each.count for each in terms)
        sum(each.total / count for each in terms).backward()
        return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    whole, halves = gradients([slice(0, 4)]), gradients([slice(0, 2), slice(2, 4)])
    assert len(whole) > 20
    for name, expected in whole.items():
        torch.testing.assert_close(halves[name], expected, atol=1e-5, rtol=1e-4, msg=name)
