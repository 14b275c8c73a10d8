"""`make bench-samplers`: what each sampler costs, and how far its chunks are from the best, at each number of steps.

Two policies of the demo's recipe: the demo's own (flow matching), and one trained here by diffusion (ten minutes,
once). Observations and recorded actions come from the dataset that `make demo-train` leaves in outputs/demo-train.

The reference of flow matching is RK4 with 100 steps from the same noise. DDPM is random: samplers of diffusion are
judged by the mean of several chunks an observation, against that of 100-step DDPM; how far two such means of DDPM's are
apart is the least that can be told. Distances are root mean squares over observations, steps and joints. The cost is
CPU time on one thread, sampling one chunk, without encoding the observation. Writes outputs/bench/samplers.json and,
with --plot, docs/images/samplers.png.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from bench_recipe import DATASET, FLOW, diffusion_checkpoint, milliradians, observations
from bench_report import write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.configuration import ACTION, ACTION_IS_PAD
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.sampling import Sampling, make_plan

STEPS = {
    "ddpm": (1, 2, 5, 10, 20, 50, 100),
    "ddim": (1, 2, 3, 5, 10, 20, 50, 100),
    "dpm_solver++": (1, 2, 3, 5, 10, 20, 50, 100),
    "euler": (1, 2, 3, 5, 10, 20, 50, 100),
    "heun": (1, 2, 3, 5, 10, 20),
    "rk4": (1, 2, 3, 5, 10),
}
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
OBSERVATIONS, CHUNKS, TIMED_RUNS = 32, 8, 9


@dataclass
class Figure:
    """One sampler with one number of steps; distances in mrad."""

    sampler: str
    steps: int
    calls: int
    milliseconds: float
    error: float  # of the reference's chunk, or mean chunk
    spread: float  # of an observation's chunks around their mean
    recorded: float  # of single chunks from the recorded actions


@dataclass
class Study:
    """The figures of one policy."""

    objective: str
    reference: str
    floor: float  # the error that the reference itself has when drawn again, mrad
    figures: list[Figure]


class Judge:
    """Samples many chunks of the observations, and measures them in action units."""

    def __init__(self, policy: MultitaskDiTPolicy, batch: dict[str, Any]):
        self._policy = policy
        self._conditioning = policy.encode(batch)
        self._origin = policy.action_origin(batch)
        past = policy.config.n_obs_steps - 1
        self._recorded, self._is_pad = batch[ACTION][:, past:], batch[ACTION_IS_PAD][:, past:]

    def chunks(self, sampler: str, steps: int, seed: int = 0) -> Tensor:
        """(observations, chunks, steps, actions) in rad, from noise that is the same for the same seed."""
        sampling = Sampling(sampler, steps, candidates=CHUNKS)
        generator = torch.Generator().manual_seed(seed)
        return self._policy.candidates_from(self._conditioning, self._origin, sampling, generator=generator)

    def from_recorded(self, chunks: Tensor) -> float:
        """The distance of single chunks from the recorded actions, where there are any."""
        error = chunks - self._recorded.unsqueeze(1)
        keep = (~self._is_pad)[:, None, :, None].expand_as(error)
        return milliradians(error[keep])

    def milliseconds(self, sampler: str, steps: int) -> float:
        """CPU time of sampling one chunk."""
        conditioning, noise = (
            self._conditioning[:1],
            torch.randn(1, self._policy.config.horizon, self._recorded.shape[-1]),
        )
        started = time.process_time()
        self._policy.sample(conditioning, Sampling(sampler, steps), noise)
        return 1e3 * (time.process_time() - started)


@torch.inference_mode()
def study(policy: MultitaskDiTPolicy, batch: dict[str, Any], samplers: tuple[str, ...], reference: str) -> Study:
    """All samplers of a policy's objective. The reference is a sampler, with 100 steps."""
    judge = Judge(policy, batch)
    is_random = reference == "ddpm"

    def compared(chunks: Tensor) -> Tensor:
        return chunks.mean(dim=1) if is_random else chunks

    best = compared(judge.chunks(reference, 100))
    again = compared(judge.chunks(reference, 100, seed=1)) if is_random else best
    choices = [(sampler, steps) for sampler in samplers for steps in STEPS[sampler]]
    # Rounds over all choices, so that what else the machine does falls on all of them alike.
    rounds = [[judge.milliseconds(*choice) for choice in choices] for _ in range(TIMED_RUNS)]
    times = [median(run[number] for run in rounds) for number in range(len(choices))]
    figures = []
    for (sampler, steps), milliseconds in zip(choices, times, strict=True):
        chunks = judge.chunks(sampler, steps, seed=2 if is_random else 0)
        figures.append(
            Figure(
                sampler,
                steps,
                make_plan(policy.objective, sampler, steps, "cpu").calls,
                milliseconds,
                error=milliradians(compared(chunks) - best),
                spread=milliradians(chunks - chunks.mean(dim=1, keepdim=True)),
                recorded=judge.from_recorded(chunks),
            )
        )
        print(figures[-1], file=sys.stderr)
    objective = "diffusion" if is_random else "flow matching"
    return Study(objective, f"{reference} 100", milliradians(again - best), figures)


def rows(studies: list[Study]) -> Iterator[dict[str, Any]]:
    """The benchmark's rows. The bars: ten steps of the default sampler must come near enough to choose it unseen."""
    for each in studies:
        how = f"{OBSERVATIONS} observations, {CHUNKS} chunks each, against {each.reference}, one thread"
        if each.floor:
            name = f"{each.objective}: {each.reference} against itself"
            yield {"name": name, "value": round(each.floor, 2), "unit": "mrad", "bar": None, "holds": True, "how": how}
        for figure in each.figures:
            name = f"{each.objective}: {figure.sampler}, {figure.steps} steps ({figure.calls} calls)"
            for what, value, unit in (
                ("error", figure.error, "mrad"),
                ("spread", figure.spread, "mrad"),
                ("error against the recorded actions", figure.recorded, "mrad"),
                ("time", figure.milliseconds, "ms CPU"),
            ):
                limit = near_enough(each, figure) if what == "error" else None
                yield {
                    "name": f"{name}: {what}",
                    "value": round(value, 2),
                    "unit": unit,
                    "bar": None if limit is None else f"<= {limit:.1f}",
                    "holds": limit is None or value <= limit,
                    "how": how,
                }


def near_enough(study: Study, figure: Figure) -> float | None:
    """The error that ten steps of the default sampler may have, mrad: twice what the reference's own chunks differ by.

    Where the reference is not random, half of what chunks from different noise differ by.
    """
    if (figure.sampler, figure.steps) not in (("ddim", 10), ("euler", 10)):
        return None
    return 2 * study.floor if study.floor else figure.spread / 2


def print_tables(studies: list[Study]) -> None:
    """One table a policy."""
    for each in studies:
        title = f"{each.objective}, against {each.reference}" + (f" (itself {each.floor:.1f})" if each.floor else "")
        table = Table("sampler", "steps", "calls", "ms CPU", "error", "spread", "from recorded, mrad", title=title)
        for figure in each.figures:
            numbers = (figure.milliseconds, figure.error, figure.spread, figure.recorded)
            table.add_row(
                figure.sampler, str(figure.steps), str(figure.calls), *(f"{number:.1f}" for number in numbers)
            )
        Console(width=110).print(table)


def plot(studies: list[Study], target: Path) -> None:
    """Error against time, one panel a policy, one line a sampler."""
    figure, axes = plt.subplots(1, len(studies), figsize=(11, 4.5), layout="constrained")
    for axis, each in zip(axes, studies, strict=True):
        for sampler in dict.fromkeys(one.sampler for one in each.figures):
            points = [one for one in each.figures if one.sampler == sampler]
            (line,) = axis.loglog(
                [one.milliseconds for one in points], [one.error for one in points], "o-", label=sampler
            )
            for one in points:
                axis.annotate(
                    str(one.steps),
                    (one.milliseconds, one.error),
                    textcoords="offset points",
                    xytext=(3, 4),
                    fontsize=7,
                    color=line.get_color(),
                )
        if each.floor:
            axis.axhline(each.floor, color="grey", linestyle="--", linewidth=1, label=f"{each.reference} drawn again")
        axis.set(
            title=f"{each.objective}: distance from {each.reference}",
            xlabel="ms of CPU time a chunk",
            ylabel="mrad (RMS)",
        )
        for scale, set_ticks in ((axis.get_xlim(), axis.set_xticks), (axis.get_ylim(), axis.set_yticks)):
            ticks = [tick for tick in TICKS if scale[0] <= tick <= scale[1]]
            set_ticks(ticks, labels=[str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend()
    figure.suptitle(
        "Numbers are steps of the sampler: heun calls the network twice in each but the last, rk4 four times"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


def main() -> int:
    """Both studies; 0 if the bars hold, 1 if one does not, 2 if the dataset is missing."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="also write docs/images/samplers.png")
    arguments = parser.parse_args()
    if not DATASET.exists():
        print(f"{DATASET} is not there: run `make demo-train` first (20 minutes)", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    flow, diffusion = (load_checkpoint(folder) for folder in (FLOW, diffusion_checkpoint()))
    (batch,) = observations(flow.config, OBSERVATIONS)
    studies = [
        study(diffusion, batch, ("ddpm", "ddim", "dpm_solver++"), "ddpm"),
        study(flow, batch, ("euler", "heun", "rk4"), "rk4"),
    ]
    found = list(rows(studies))
    write("samplers", found)
    print_tables(studies)
    if arguments.plot:
        plot(studies, Path("docs/images/samplers.png"))
    failed = [row for row in found if not row["holds"]]
    for row in failed:
        print(f"FAILS: {row['name']}: {row['value']} {row['unit']}, bar {row['bar']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
