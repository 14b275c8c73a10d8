"""Normalisation: ranges, round trips, constants, and statistics that cannot be used."""

import numpy as np
import pytest
import torch

from dit_policy_ros.policy.normalization import Normalizer, StatsError

STATS = {"x": {"min": [-1.0, 0.0], "max": [3.0, 10.0], "mean": [0.5, 4.0], "std": [2.0, 0.5]}}


def test_min_max_maps_the_range_to_plus_minus_one():
    normalizer = Normalizer("x", "MIN_MAX", 2, STATS)
    values = torch.tensor([[-1.0, 0.0], [3.0, 10.0], [1.0, 5.0], [5.0, 15.0]])
    expected = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [2.0, 2.0]])  # beyond the range: not clamped
    torch.testing.assert_close(normalizer(values), expected)
    torch.testing.assert_close(normalizer.undo(expected), values)


def test_mean_std_and_identity():
    values = torch.tensor([[0.5, 4.0], [4.5, 5.0]])
    expected = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    torch.testing.assert_close(Normalizer("x", "MEAN_STD", 2, STATS)(values), expected)
    torch.testing.assert_close(Normalizer("x", "MEAN_STD", 2, STATS).undo(expected), values)
    assert torch.equal(Normalizer("x", "IDENTITY", 2, {})(values), values)


@pytest.mark.parametrize("mode", ["MIN_MAX", "MEAN_STD"])
@pytest.mark.parametrize("constant", [0.0, 0.7, -2356.1])
@pytest.mark.parametrize("rounding", [0.0, 1e-8])
def test_a_constant_dimension_is_zero_inside_and_its_constant_outside(mode, constant, rounding):
    spread = rounding * max(1, abs(constant))
    stats = {
        "x": {
            "min": np.array([constant - spread, 0.0]),
            "max": np.array([constant + spread, 1.0]),
            "mean": np.array([constant, 0.5]),
            "std": np.array([spread, 0.3]),
        }
    }
    normalizer = Normalizer("x", mode, 2, stats)
    seen = torch.tensor([[constant, 0.5], [constant + 1e-4, 0.5], [constant - 3.0, 0.5]])
    assert torch.equal(normalizer(seen), torch.zeros(3, 2))
    restored = normalizer.undo(torch.tensor([[0.0, 0.0], [5.0, 0.0]]))
    assert torch.equal(restored[:, 0], torch.full((2,), constant))


def test_a_small_range_is_still_a_range():
    normalizer = Normalizer("x", "MIN_MAX", 1, {"x": {"min": [0.0], "max": [1e-4]}})
    torch.testing.assert_close(normalizer(torch.tensor([1e-4])), torch.tensor([1.0]))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "lack min of x"),
        ({"min": [0.0], "max": [1.0]}, "min has 1 values, the feature has 2"),
        ({"min": [0.0, float("nan")], "max": [1.0, 1.0]}, "min is not finite"),
        ({"min": [0.0, 2.0], "max": [1.0, 1.0]}, "min exceeds max"),
    ],
)
def test_unusable_statistics_are_refused(entry, message):
    with pytest.raises(StatsError, match=message):
        Normalizer("x", "MIN_MAX", 2, {"x": entry})


def test_negative_deviation_is_refused():
    with pytest.raises(StatsError, match="std is negative"):
        Normalizer("x", "MEAN_STD", 1, {"x": {"mean": [0.0], "std": [-1.0]}})
