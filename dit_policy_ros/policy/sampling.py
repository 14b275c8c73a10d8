"""From noise to actions: what a sampler is asked for (`Sampling`), and the plan that answers it (`make_plan`).

| objective | sampler | network calls a step | source |
|---|---|---|---|
| diffusion | `ddpm` | 1, random | arXiv 2006.11239, eq. 6 and 7 |
| | `ddim` | 1 | arXiv 2010.02502, eq. 12 with sigma = 0 |
| | `dpm_solver++` | 1 | arXiv 2211.01095, algorithm 2 (2M), the last step of first order |
| flow matching | `euler` | 1 | |
| | `heun` | 2, in the last 1 | explicit trapezoid, the last step by Euler's method, as in diffusers |
| | `rk4` | 4 | the classical Runge-Kutta method |
"""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Literal, get_args

import torch

from .configuration import ObjectiveConfig, PolicyConfig
from .diffusion_plan import diffusion_plan
from .flow_plan import flow_plan
from .noise import check_noise, draw_noise, draw_step_noise
from .objectives import Diffusion, FlowMatching
from .plan import Plan, Predict, by_instruction, guide, token_timesteps

# What sampling takes, whichever file a part of it stands in.
__all__ = [
    "AS_CONFIGURED",
    "Joining",
    "JoiningChoice",
    "Plan",
    "Predict",
    "ResolvedSampling",
    "Sampling",
    "by_instruction",
    "check_noise",
    "draw_noise",
    "draw_step_noise",
    "guide",
    "is_whole",
    "make_plan",
    "samplers_of",
    "token_timesteps",
]

Joining = Literal["guided", "guided_cheap", "prefix"]
JoiningChoice = Literal["auto", "guided", "guided_cheap", "prefix"]


@dataclass(frozen=True)
class Sampling:
    """How a chunk is sampled; None: as the policy's configuration says.

    `denoising_steps` are steps of the sampler: `heun` calls the network twice in each but the last, `rk4` four times.
    `guidance_scale` s is that of classifier-free guidance: prediction without the instruction + s * (with - without).
    `candidates` chunks are sampled in one batch and the best is kept (candidates.py); how much a step's distance from
    the chunk in motion counts falls by `coherence_decay` a step.

    `joining` says how a chunk is made to agree with the one in motion, if there is one (realtime.py): "guided" by its
    gradient through the network, "guided_cheap" without the network's Jacobian, "prefix" by giving its committed steps
    clean; "auto" takes the best of those that the policy and the chunk in motion allow (`realtime.choose_joining`).
    None: the chunk in motion only serves to choose among the candidates. `max_joining_weight` bounds the weight of that
    pull (beta in arXiv 2506.07339); it has nothing to do with `guidance_scale`, which is about the instruction.
    """

    sampler: str | None = None
    denoising_steps: int | None = None
    guidance_scale: float | None = None
    candidates: int = 1
    coherence_decay: float = 0.9
    joining: JoiningChoice | None = "auto"
    max_joining_weight: float = 5.0

    def resolve(self, config: PolicyConfig) -> "ResolvedSampling":
        """The same with nothing left open. Raises ValueError naming every choice the policy cannot follow."""
        objective = config.objective
        resolved = ResolvedSampling(
            sampler=getattr(objective, "sampler", "") if self.sampler is None else self.sampler,
            denoising_steps=_as_int(
                objective.denoising_steps if self.denoising_steps is None else self.denoising_steps
            ),
            guidance_scale=config.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            candidates=_as_int(self.candidates),
            coherence_decay=self.coherence_decay,
            joining=self.joining,
            max_joining_weight=self.max_joining_weight,
        )
        problems = [*_sampler_problems(objective, resolved.sampler, resolved.denoising_steps), *resolved.problems()]
        if is_finite(resolved.guidance_scale) and resolved.guidance_scale != 1 and config.instruction_dropout == 0:
            problems.append(
                f"guidance_scale {resolved.guidance_scale} needs a policy trained with instruction_dropout above 0: "
                "this one does not know what it would do without the instruction; use 1"
            )
        if problems:
            raise ValueError("the policy cannot be sampled like that:\n  - " + "\n  - ".join(problems))
        return resolved


AS_CONFIGURED = Sampling()


@dataclass(frozen=True)
class ResolvedSampling:
    """`Sampling` for one policy, every choice made and valid. Fields as there."""

    sampler: str
    denoising_steps: int
    guidance_scale: float
    candidates: int
    coherence_decay: float
    joining: JoiningChoice | None
    max_joining_weight: float

    def problems(self) -> list[str]:
        """What is wrong whatever the policy, a sentence each."""
        found = []
        if not (is_finite(self.guidance_scale) and self.guidance_scale >= 0):
            found.append(f"guidance_scale must be at least 0 and finite, got {self.guidance_scale!r}")
        if not is_whole(self.candidates) or self.candidates < 1:
            found.append(f"candidates must be a whole number of at least 1, got {self.candidates!r}")
        if not (is_finite(self.coherence_decay) and 0 < self.coherence_decay <= 1):
            found.append(f"coherence_decay must be above 0 and at most 1, got {self.coherence_decay!r}")
        choices = get_args(JoiningChoice)
        if self.joining is not None and self.joining not in choices:
            found.append(f"joining must be one of {', '.join(choices)}, or None; got {self.joining!r}")
        if not (is_finite(self.max_joining_weight) and self.max_joining_weight > 0):
            found.append(f"max_joining_weight must be positive and finite, got {self.max_joining_weight!r}")
        return found


def samplers_of(objective: ObjectiveConfig) -> tuple[str, ...]:
    """The samplers an objective may be used with."""
    # get_type_hints would evaluate every annotation anew, 0.1 ms for each chunk.
    return get_args({each.name: each.type for each in fields(objective)}["sampler"])


def _sampler_problems(objective: ObjectiveConfig, sampler: str, steps: int) -> list[str]:
    found = []
    choices = samplers_of(objective)
    if sampler not in choices:
        name = objective.get_choice_name(type(objective))
        found.append(f"sampler must be one of {', '.join(choices)} (the policy's objective is {name}), got {sampler!r}")
    if not is_whole(steps) or not 1 <= steps <= objective.max_denoising_steps:
        found.append(f"denoising_steps must be 1 to {objective.max_denoising_steps}, got {steps!r}")
    return found


def is_whole(number: object) -> bool:
    """Whether it is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(number, Integral) and not isinstance(number, bool)


def is_finite(number: object) -> bool:
    """Whether it is a finite real number, Python's or NumPy's; True and False are none."""
    return isinstance(number, Real) and not isinstance(number, bool) and math.isfinite(number)


def _as_int(number: int) -> int:
    return int(number) if is_whole(number) else number  # what is no whole number is refused, by its own name


def make_plan(objective: Diffusion | FlowMatching, sampler: str, steps: int, device: torch.device | str) -> Plan:
    """The plan of a sampler of the objective with that many steps. Raises ValueError, naming the choices.

    The objective keeps its plans: to make one takes up to a millisecond and, of tables on a GPU, waits for the device.
    """
    problems = _sampler_problems(objective.config, sampler, steps)
    if problems:
        raise ValueError("; ".join(problems))
    device = torch.device(device)
    key = (sampler, int(steps), device, *vars(objective.config).values())
    return objective.plans.get(key, lambda: _new_plan(objective, sampler, int(steps), device))


@torch.inference_mode(False)  # a plan outlives its first caller, whose mode its tensors must not inherit
def _new_plan(objective: Diffusion | FlowMatching, sampler: str, steps: int, device: torch.device) -> Plan:
    if isinstance(objective, Diffusion):
        return diffusion_plan(objective, sampler, steps, device)
    return flow_plan(objective, sampler, steps, device)
