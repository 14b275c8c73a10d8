"""State and actions between their units and the range the model works in."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import NormalizationMode

Stats = Mapping[str, Mapping[str, Any]]
"""{feature key: {"min", "max", "mean", "std": a list, an array or a tensor of the feature's length}}"""

NEGLIGIBLE = 1e-6
"""A range or deviation below this share of the value's size (of 1 for small values) is rounding, not motion."""


class StatsError(ValueError):
    """Statistics that are missing, malformed or contradict themselves."""


class Normalizer(nn.Module):
    """x -> (x - centre) / scale for one feature, and back.

    MIN_MAX maps [min, max] to [-1, 1], MEAN_STD to zero mean and unit deviation, IDENTITY changes nothing.

    A dimension that was constant in the data (min == max, or std == 0) maps to exactly 0 (with MIN_MAX to
    `constant`), and back to exactly its constant. A deviation from the constant is ignored: no data says what it
    means, and dividing by a tiny range would turn a deviation of 1e-4 into thousands.
    """

    centre: Tensor
    scale: Tensor
    inverse_scale: Tensor
    offset: Tensor

    def __init__(self, key: str, mode: NormalizationMode, dim: int, stats: Stats, constant: float = 0.0):
        super().__init__()
        centre, scale = _centre_and_scale(key, mode, dim, stats)
        scale = torch.where(scale <= NEGLIGIBLE * centre.abs().clamp_min(1), 0.0, scale)
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        offset = torch.where(scale > 0, 0.0, constant if mode == "MIN_MAX" else 0.0)
        self._table = {
            "centre": centre.float(),
            "scale": scale.float(),
            "inverse_scale": inverse.float(),
            "offset": offset.float(),
        }
        self.reset_buffers("cpu")

    def reset_buffers(self, device: torch.device | str) -> None:
        """Makes the tables that are not in the state_dict anew, on a device."""
        # Statistics are a file of their own in a checkpoint, so they stay out of the state_dict.
        for name, table in self._table.items():
            self.register_buffer(name, table.to(device, copy=True), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) in units -> (..., dim) normalised."""
        return (x - self.centre) * self.inverse_scale + self.offset

    def undo(self, x: Tensor) -> Tensor:
        """(..., dim) normalised -> (..., dim) in units."""
        return x * self.scale + self.centre


def _centre_and_scale(key: str, mode: NormalizationMode, dim: int, stats: Stats) -> tuple[Tensor, Tensor]:
    if mode == "IDENTITY":
        return torch.zeros(dim, dtype=torch.float64, device="cpu"), torch.ones(dim, dtype=torch.float64, device="cpu")
    low, high = ("min", "max") if mode == "MIN_MAX" else ("mean", "std")
    first, second = _statistic(key, low, dim, stats), _statistic(key, high, dim, stats)
    if mode == "MEAN_STD":
        if (second < 0).any():
            raise StatsError(f"statistics of {key}: std is negative: {second.tolist()}")
        return first, second
    if (first > second).any():
        raise StatsError(f"statistics of {key}: min exceeds max: {first.tolist()} and {second.tolist()}")
    return (first + second) / 2, (second - first) / 2


def _statistic(key: str, name: str, dim: int, stats: Stats) -> Tensor:
    if key not in stats or name not in stats[key]:
        raise StatsError(f"statistics lack {name} of {key}; compute them from the dataset the policy is trained on")
    # On the CPU whatever the default device is: a model may be built on the meta device, its statistics are known.
    value = torch.as_tensor(stats[key][name], dtype=torch.float64, device="cpu").flatten()
    if value.shape != (dim,):
        raise StatsError(f"statistics of {key}: {name} has {len(value)} values, the feature has {dim}")
    if not value.isfinite().all():
        raise StatsError(f"statistics of {key}: {name} is not finite: {value.tolist()}")
    return value


def stats_to_lists(stats: Stats) -> dict[str, dict[str, Any]]:
    """The statistics as plain lists, for JSON."""
    return {
        key: {name: torch.as_tensor(value, dtype=torch.float64, device="cpu").tolist() for name, value in entry.items()}
        for key, entry in stats.items()
    }
