"""The samplers of flow matching: explicit Runge-Kutta methods along the velocity."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .objectives import FlowMatching
from .plan import Level, Plan, Predict, combination


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method whose every stage starts from the one before it.

    Stage i is taken at `times[i]` of the step, from x + `times[i]` * step * (velocity of stage i - 1); the step is the
    mean of the velocities by `weights`.
    """

    times: tuple[float, ...]
    weights: tuple[float, ...]


EULER = Tableau((0.0,), (1.0,))
HEUN = Tableau((0.0, 1.0), (1 / 2, 1 / 2))
RK4 = Tableau((0.0, 1 / 2, 1 / 2, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def tableaus(sampler: str, steps: int) -> tuple[Tableau, ...]:
    """The method of each step.

    Heun's last step is Euler's: its second stage would ask the network at t = 1, where it is not trained and its
    velocity says little. RK4 does ask there, as LeRobot's: with few steps its last stage spoils the chunk.
    """
    if sampler == "heun":
        return (HEUN,) * (steps - 1) + (EULER,)
    return ({"euler": EULER, "rk4": RK4}[sampler],) * steps


@dataclass(frozen=True, eq=False)
class FlowPlan(Plan):
    """The velocity integrated from noise at t = 0 to actions at t = 1 in equal steps."""

    tableaus: tuple[Tableau, ...]

    def _loop(self, predict: Predict, x: Tensor, step_noise: Tensor | None) -> Tensor:
        call = 0
        for tableau in self.tableaus:
            velocities: list[Tensor] = []
            for time in tableau.times:
                at = torch.add(x, velocities[-1], alpha=time / self.steps) if velocities else x
                velocities.append(predict(at, call))
                call += 1
            weights = (weight / self.steps for weight in tableau.weights)
            x = combination((1.0, x), *zip(weights, velocities, strict=True))
        return x


def flow_plan(objective: FlowMatching, sampler: str, steps: int, device: torch.device) -> FlowPlan:
    """The plan of a sampler of flow matching with that many steps, both valid."""
    methods = tableaus(sampler, steps)
    times = [(i + time) / steps for i, method in enumerate(methods) for time in method.times]
    return FlowPlan(
        sampler,
        steps,
        timesteps=objective.embedding_timestep(torch.tensor(times, dtype=torch.float32, device=device)),
        clean_timestep=objective.clean_timestep,
        levels=tuple(Level(signal=t, noise=1 - t, of_x=1.0, of_out=1 - t) for t in times),
        tableaus=methods,
    )
