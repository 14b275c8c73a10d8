"""The choice among candidate chunks, in closed form, and as the policy makes it."""

import math

import pytest
import torch
from policy_fixtures import demo_config, make_batch, make_stats, randomize

from dit_policy_ros.policy.candidates import backward_coherence, choose_candidate, forward_contrast
from dit_policy_ros.policy.configuration import FlowMatchingConfig
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.realtime import ChunkInMotion
from dit_policy_ros.policy.sampling import Sampling
from dit_policy_ros.policy.tiny_clip import make_tiny_clip


def constant(*values, steps=4, dims=2):
    """Chunks (1, N, steps, dims), each the same number throughout."""
    return torch.tensor(values).view(1, -1, 1, 1).expand(-1, -1, steps, dims)


def test_backward_coherence_decays_with_the_step():
    candidates = constant(0.0, 3.0)
    in_motion = torch.zeros(1, 3, 2)
    # Each step of the second is 3 sqrt(2) away; three steps overlap: 1 + 0.5 + 0.25.
    expected = torch.tensor([[0.0, 3 * math.sqrt(2) * 1.75]])
    torch.testing.assert_close(backward_coherence(candidates, in_motion, 0.5), expected)


def test_a_difference_counts_by_when_it_comes():
    early, late = torch.zeros(2, 4, 1).unbind()
    early[0], late[3] = 1.0, 1.0
    loss = backward_coherence(torch.stack([early, late]).unsqueeze(0), torch.zeros(1, 4, 1), 0.5)
    assert loss.tolist() == [[1.0, 0.125]]


def test_forward_contrast_is_near_the_candidates_and_far_from_the_weaker():
    candidates = constant(0.0, 1.0, 5.0, dims=1)
    # Distances over four steps: to each other (0, 4, 20), (4, 0, 16), (20, 16, 0), to a weaker chunk at 2: 8, 4, 12.
    assert forward_contrast(candidates, None).tolist() == [[8.0, pytest.approx(20 / 3), 12.0]]
    contrast = forward_contrast(candidates, constant(2.0, 2.0, dims=1))
    torch.testing.assert_close(contrast, torch.tensor([[0.0, 20 / 3 - 4, 0.0]]))


def test_what_is_chosen():
    candidates = constant(0.0, 1.0, 5.0, dims=1)
    assert choose_candidate(candidates).tolist() == [1]
    assert choose_candidate(candidates, in_motion=torch.full((1, 2, 1), 4.0)).tolist() == [2]
    # Distances to the others 8, 6.67, 12, to the weaker policy's 4, 0.27, 16: contrast 4, 6.4, -4.
    weaker = constant(1.0, 0.9, 1.1, dims=1)
    assert choose_candidate(candidates, weaker=weaker).tolist() == [2]
    # Backward coherence 0, 4, 20 without decay, 0, 1.11, 5.55 with: it outweighs the contrast only without.
    in_motion = torch.zeros(1, 4, 1)
    assert choose_candidate(candidates, in_motion, 1.0, weaker).tolist() == [0]
    assert choose_candidate(candidates, in_motion, 0.1, weaker).tolist() == [2]


def test_each_observation_has_its_own_choice():
    candidates = torch.cat([constant(0.0, 1.0, dims=1), constant(1.0, 0.0, dims=1)])
    assert choose_candidate(candidates, torch.zeros(1, 4, 1)).tolist() == [0, 1]
    assert choose_candidate(candidates, torch.stack([torch.zeros(4, 1), torch.ones(4, 1)])).tolist() == [0, 0]


def test_chunks_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="has 5 steps left, more than the candidates' 4"):
        backward_coherence(constant(0.0), torch.zeros(1, 5, 2), 0.9)
    with pytest.raises(ValueError, match=r"weaker policy's chunks have shape \(3, 2\)"):
        forward_contrast(constant(0.0), constant(0.0, steps=3))


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Two policies that differ in their weights, relative actions, flow matching."""
    folder = tmp_path_factory.mktemp("tiny_clip")
    make_tiny_clip(folder)
    made = []
    for seed in (0, 1):
        config = demo_config(str(folder), objective=FlowMatchingConfig(denoising_steps=2))
        torch.manual_seed(0)
        policy = MultitaskDiTPolicy(config, make_stats(config)).eval()
        randomize(policy.noise_predictor, seed=seed)
        made.append(policy)
    return made


def generator():
    return torch.Generator().manual_seed(7)


def test_candidates_are_the_chunks_sampled_one_by_one(policies):
    policy = policies[0]
    batch, noise = make_batch(policy.config, 2), torch.randn(6, 16, 7)
    encoded = []
    handle = policy.observation_encoder.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    candidates = policy.predict_candidates(batch, Sampling(candidates=3), noise)
    handle.remove()
    assert candidates.shape == (2, 3, 16, 7)
    assert len(encoded) == 1  # one observation, one encoding
    for number in range(3):
        one = policy.predict_chunk(batch, noise=noise.view(2, 3, 16, 7)[:, number])
        torch.testing.assert_close(candidates[:, number], one, atol=1e-5, rtol=1e-5)


def test_the_policy_keeps_the_candidate_that_goes_on_with_the_motion(policies):
    policy = policies[0]
    batch, noise = make_batch(policy.config, 2), torch.randn(8, 16, 7)
    sampling = Sampling(candidates=4, joining=None)
    candidates = policy.predict_candidates(batch, sampling, noise)
    motion = ChunkInMotion(candidates[[0, 1], [2, 1], :9] + 1e-3, delay=2, execution_horizon=8)
    chunk = policy.predict_chunk(batch, sampling, noise, motion=motion)
    assert torch.equal(chunk, candidates[[0, 1], [2, 1]])
    # Without a chunk in motion, the one closest to the others, in the model's space.
    normalised = policy.action_normalizer(candidates)
    apart = (normalised.unsqueeze(2) - normalised.unsqueeze(1)).norm(dim=-1).sum(dim=(2, 3))
    expected = candidates[[0, 1], apart.argmin(dim=1)]
    assert torch.equal(policy.predict_chunk(batch, sampling, noise), expected)


def test_a_weaker_policy_changes_the_choice(policies):
    """Written out after arXiv 2408.17355, eq. 4: near to one's own candidates, far from the weaker policy's."""
    policy, weaker = policies
    batch, noise = make_batch(policy.config, 1), torch.randn(6, 16, 7, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(candidates=6)
    candidates = policy.predict_candidates(batch, sampling, noise)
    proposed = weaker.predict_candidates(batch, Sampling(candidates=6), generator=generator())
    ours, theirs = (policy.action_normalizer(chunks)[0].tolist() for chunks in (candidates, proposed))

    def mean_distance(one, others):
        return sum(math.dist(a, b) for other in others for a, b in zip(one, other, strict=True)) / len(others)

    alone = [mean_distance(one, ours) for one in ours]
    contrast = [mean_distance(one, ours) - mean_distance(one, theirs) for one in ours]
    without, best = alone.index(min(alone)), contrast.index(min(contrast))
    assert without != best
    assert torch.equal(policy.predict_chunk(batch, sampling, noise), candidates[:, without])
    chunk = policy.predict_chunk(batch, sampling, noise, generator(), weaker=weaker)
    assert torch.equal(chunk, candidates[:, best])


def test_arguments_without_effect_are_refused(policies):
    policy, weaker = policies
    batch = make_batch(policy.config, 1)
    with pytest.raises(ValueError, match="weaker"):
        policy.predict_chunk(batch, weaker=weaker)
    motion = ChunkInMotion(torch.zeros(1, 9, 7), delay=2, execution_horizon=8)
    with pytest.raises(ValueError, match="motion"):
        policy.predict_chunk(batch, Sampling(joining=None), motion=motion)
    with pytest.raises(ValueError, match=r"noise must have the shape \(4, 16, 7\)"):
        policy.predict_candidates(batch, Sampling(candidates=4), torch.randn(1, 16, 7))
