"""What the samplers have in common: a plan, which is a sampler with its number of steps, ready to run.

All its coefficients are worked out when it is made. Its loop, `run`, calls `predict(x (B, T, A), call) -> (B, T, A)`,
the transformer with the conditioning and the timestep `plan.timesteps[call]` filled in, and never waits for the device,
so that the whole of it fits one CUDA graph.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Predict = Callable[[Tensor, int], Tensor]
"""(x (B, T, A), number of the call) -> the transformer's output (B, T, A)."""


@dataclass(frozen=True)
class Level:
    """How noisy x is at one network call, x = signal * clean + noise * epsilon, and what the output says of clean.

    The estimate of the clean actions is (of_x * x + of_out * out) / over. Dividing last, as diffusers does, keeps the
    rounding at the noisiest timestep (over = 5e-5) the same as there.
    """

    signal: float
    noise: float
    of_x: float
    of_out: float
    over: float = 1.0

    def clean(self, x: Tensor, out: Tensor) -> Tensor:
        """The estimate of the clean actions (B, T, A) from x and the network's output."""
        return (combination((self.of_x, x), (self.of_out, out))) / self.over


@dataclass(frozen=True, eq=False)
class Plan(ABC):
    """A sampler with its number of steps, ready to run.

    `timesteps` (calls,) float32, on the plan's device, is what the transformer's timestep embedding is given at each
    network call; `clean_timestep` is that of a step which is known already. `levels` has an entry a call.
    """

    sampler: str
    steps: int
    timesteps: Tensor
    clean_timestep: float
    levels: tuple[Level, ...]

    @property
    def calls(self) -> int:
        """How often a chunk calls the network."""
        return len(self.levels)

    @property
    def draws_noise(self) -> bool:
        """Whether `run` wants step_noise."""
        return self.sampler == "ddpm"

    def clip(self, clean: Tensor) -> Tensor:
        """An estimate of the clean actions within the range the plan keeps to."""
        return clean

    def step_noise_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The shape of step_noise for x of shape (B, T, A), or None."""
        return (self.steps, *shape) if self.draws_noise else None

    def run(
        self, predict: Predict, x: Tensor, step_noise: Tensor | None = None, prefix: Tensor | None = None
    ) -> Tensor:
        """Noise x (B, T, A) -> normalised actions (B, T, A).

        step_noise as `draw_step_noise` gives it. prefix (B, P, A), normalised: the first P steps are known; the network
        sees them at every call, and they are returned as they are. Raises ValueError for step_noise of another shape.
        """
        wanted = self.step_noise_shape(x.shape)
        if (None if step_noise is None else tuple(step_noise.shape)) != wanted:
            raise ValueError(
                f"{self.sampler} in {self.steps} steps wants step_noise of shape {wanted}; draw_step_noise"
            )
        if prefix is None:
            return self._loop(predict, x, step_noise)
        return hold(self._loop(lambda x, call: predict(hold(x, prefix), call), x, step_noise), prefix)

    @abstractmethod
    def _loop(self, predict: Predict, x: Tensor, step_noise: Tensor | None) -> Tensor:
        """The sampler's loop, of `self.calls` calls."""


def hold(x: Tensor, prefix: Tensor) -> Tensor:
    """x (B, T, A) with its first P steps replaced by prefix (B, P, A)."""
    return torch.cat([prefix, x[:, prefix.shape[1] :]], dim=1)


def token_timesteps(plan: Plan, call: int, batch: int, horizon: int, prefix_steps: int) -> Tensor:
    """The timestep of each step of a chunk whose first steps are a prefix, (B, T) float32."""
    known = torch.arange(horizon, device=plan.timesteps.device) < prefix_steps
    return torch.where(known, plan.clean_timestep, plan.timesteps[call]).expand(batch, horizon)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6 in terms of s = 1 + w): beyond what the instruction changes."""
    return unconditional + scale * (conditional - unconditional)


def by_instruction(network: Predict, scale: float) -> Predict:
    """A network guided by the instruction: `network` has conditionings with it for the first half of its batch and
    without it for the second, and is given x (B, T, A) for both at once.
    """

    def predict(x: Tensor, call: int) -> Tensor:
        out = network(torch.cat([x, x]), call)
        return guide(out[: len(x)], out[len(x) :], scale)

    return predict


def combination(*terms: tuple[float, Tensor | None]) -> Tensor:
    """The sum of factor * tensor over the terms whose factor is not zero (their tensor is then not None)."""
    total: Tensor | None = None
    for factor, tensor in terms:
        if factor == 0:
            continue
        assert tensor is not None
        if total is None:
            total = tensor if factor == 1 else factor * tensor
        else:
            total = torch.add(total, tensor, alpha=factor)
    assert total is not None
    return total
