"""How often a policy does the demo's task, in simulated time: the same figures on any machine, however busy.

    python -m dit_policy_ros.sim.rollout --checkpoint=runs/a/checkpoints/last --episodes=20

The scenes, the instructions and the judge are the demo's, the conductor, the gate and the engine are the node's, and
the settings have the names of the node's parameters. Only time is simulated: a chunk takes `latency` seconds to come,
however long it is computed. Writes a report of every episode as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.engine import PolicyEngine, Precision
from dit_policy_ros.policy.sampling import Sampling
from dit_policy_ros.runtime.decisions import Outcome, Settings
from dit_policy_ros.runtime.joining import JOININGS
from dit_policy_ros.runtime.observations import ObservationBuffer
from dit_policy_ros.runtime.pipeline import ChunkPipeline
from dit_policy_ros.sim import topics
from dit_policy_ros.sim.closed_loop import ClosedLoop, Episode
from dit_policy_ros.sim.scene import ARM_JOINTS
from dit_policy_ros.sim.simulation import OffscreenError, Simulation
from dit_policy_ros.sim.task import CONTROLS, FIRST_SEED, instruction_for, target_of

LATENCY = 0.03  # s; the demo's policy needs about this on a CPU


def rollout(options: argparse.Namespace, console: Console | None = None) -> dict[str, Any]:
    """Run all episodes; what came of them, as the report holds it.

    The noise of an episode depends on its scene's seed alone, not on the episodes before it. Raises ValueError for a
    checkpoint of another robot, and for settings that the policy cannot follow.
    """
    folder = options.checkpoint
    embodiment = _embodiment(folder)
    torch.set_num_threads(1)  # more would add up in another order
    policy = load_checkpoint(folder, options.device)
    settings = _settings(options, policy.config.n_action_steps)
    _check_steps(settings, policy.config.max_action_steps)
    settings.sampling.resolve(policy.config)
    engine = PolicyEngine(policy, options.precision)
    began = time.perf_counter()
    chunk_seconds = _warmed_up(engine, embodiment, settings.sampling)
    episodes: list[tuple[int, str, Episode]] = []
    with Simulation(camera_size=_camera_size(embodiment)) as simulation, _progress(console or Console()) as bar:
        loop = ClosedLoop(engine, embodiment, simulation, options.latency, options.control == "blank_images")
        job = bar.add_task("episodes", total=options.episodes, note="")
        for number in range(options.episodes):
            seed, target = options.seed + number, target_of(number, options.control)
            torch.manual_seed(seed)
            episodes.append((seed, target, loop.run(seed, target, settings)))
            done = sum(episode.success for _, _, episode in episodes)
            bar.update(job, advance=1, note=f"{done} succeeded")
    resolved = settings.sampling.resolve(policy.config)
    return {
        "checkpoint": str(folder),
        "control": options.control,
        "settings": {
            "n_action_steps": settings.n_action_steps,
            "denoising_steps": resolved.denoising_steps,
            "sampler": resolved.sampler,
            "guidance_scale": resolved.guidance_scale,
            "joining": settings.joining,
            "precision": options.precision,
            "latency": options.latency,
        },
        **_figures(episodes),
        "chunk_ms": round(1e3 * chunk_seconds, 1),  # of this machine as busy as it was; nothing depends on it
        "seconds": round(time.perf_counter() - began, 1),
    }


def _embodiment(folder: Path) -> Embodiment:
    """The checkpoint's, if it is one of the simulated arm."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"no checkpoint in {folder}: expected a folder with config.json and model.safetensors")
    if not (folder / "embodiment.yaml").is_file():
        raise ValueError(f"{folder} has no embodiment.yaml, so nobody knows whether it is of the simulated arm")
    embodiment = Embodiment.load(folder / "embodiment.yaml")
    wrong = [
        f"{what} {', '.join(sorted(theirs))}, where the simulator has {', '.join(ours)}"
        for what, theirs, ours in (
            ("the cameras' topics are", {camera.topic for camera in embodiment.cameras}, topics.IMAGES.values()),
            ("the state's topic is", {embodiment.state.topic}, (topics.JOINT_STATES,)),
            ("the action's joints are", set(embodiment.action_joints), ARM_JOINTS),
        )
        if not theirs <= set(ours)
    ]
    if wrong:
        raise ValueError(
            f"{folder} is a policy for '{embodiment.name}', not for the simulated arm, and cannot be tried in its "
            "simulator:\n  - " + "\n  - ".join(wrong)
        )
    return embodiment


def _camera_size(embodiment: Embodiment) -> tuple[int, int]:
    sizes = {(camera.height, camera.width) for camera in embodiment.cameras}
    if len(sizes) != 1:
        raise ValueError(f"the simulator's cameras all have one size; the embodiment's have {sorted(sizes)}")
    return sizes.pop()


def _settings(options: argparse.Namespace, n_action_steps: int) -> Settings:
    sampling = Sampling(
        sampler=options.sampler or None,
        denoising_steps=options.denoising_steps or None,
        guidance_scale=options.guidance_scale or None,
    )
    return Settings(
        n_action_steps=options.n_action_steps or n_action_steps,
        sampling=sampling,
        joining=options.joining,
        recovery="automatic",  # as in the demo: nobody is there to resume
    )


def _check_steps(settings: Settings, most: int) -> None:
    if settings.n_action_steps > most:
        raise ValueError(
            f"n_action_steps {settings.n_action_steps}: a chunk of this policy has {most} steps from the newest "
            "observation on (horizon - n_obs_steps + 1)"
        )


def _warmed_up(engine: PolicyEngine, embodiment: Embodiment, sampling: Sampling) -> float:
    """Seconds of one chunk; before it the engine's fast paths are checked, as the node does at configure."""
    observations = ObservationBuffer(embodiment, engine.policy.config.n_obs_steps)
    return ChunkPipeline(engine, embodiment, observations, lambda: 0).warm_up(2, sampling)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _figures(episodes: Sequence[tuple[int, str, Episode]]) -> dict[str, Any]:
    """The sums, and a row an episode."""
    refused = [outcome for _, _, episode in episodes for outcome in _refused(episode)]
    seams = [o.seam for _, _, episode in episodes for o in episode.outcomes if o.seam is not None]
    verdicts = Counter(outcome.decision.verdict.name.lower() for outcome in refused)
    return {
        "episodes": len(episodes),
        "success": sum(episode.success for _, _, episode in episodes),
        "wrong_block": sum(episode.wrong_block for _, _, episode in episodes),
        "chunks": sum(len(episode.outcomes) for _, _, episode in episodes),
        "refused": dict(verdicts.most_common()),
        "reasons": list(dict.fromkeys(outcome.decision.reason for outcome in refused))[:10],
        "stops": sum(episode.stops for _, _, episode in episodes),
        "seam_velocity": _median([seam.velocity for seam in seams]),  # rad/s, the jump where a chunk takes over
        "results": [_row(seed, target, episode) for seed, target, episode in episodes],
    }


def _refused(episode: Episode) -> list[Outcome]:
    return [*(outcome for outcome in episode.outcomes if not outcome.decision.accepted), *episode.missed]


def _median(values: Sequence[float]) -> float | None:
    return round(sorted(values)[len(values) // 2], 4) if values else None


def _row(seed: int, target: str, episode: Episode) -> dict[str, Any]:
    outcome = "moved another block" if episode.wrong_block else "over the line" if episode.success else "time limit"
    return {
        "seed": seed,
        "instruction": instruction_for(target),
        "success": episode.success,
        "wrong_block": episode.wrong_block,
        "outcome": outcome,
        "duration_s": round(episode.seconds, 2),
        "moved_m": {colour: round(distance, 4) for colour, distance in episode.moved.items()},
        "chunks": len(episode.outcomes),
        "refused": len(_refused(episode)),
    }


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    lines = [
        f"{report['success']} of {report['episodes']} blocks pushed over the line, the wrong block moved "
        f"{report['wrong_block']} times ({report['seconds']} s)"
    ]
    if report["refused"]:
        lines.append("refused: " + ", ".join(f"{count} {name}" for name, count in report["refused"].items()))
        lines += [f"  {reason}" for reason in report["reasons"][:3]]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_policy_ros.sim.rollout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"), help="folder of the policy")
    parser.add_argument("--episodes", type=int, default=20, help="how many scenes (default: 20)")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="of the first scene; the next has the next")
    parser.add_argument("--control", choices=CONTROLS, default="none", help="what the policy is deprived of")
    parser.add_argument("--n_action_steps", type=int, default=0, help="steps executed of a chunk; 0: the checkpoint's")
    parser.add_argument("--denoising_steps", type=int, default=0, help="of the sampler; 0: the checkpoint's")
    parser.add_argument("--sampler", default="", help="ddpm, ddim, dpm_solver++, euler, heun, rk4; the checkpoint's")
    parser.add_argument("--guidance_scale", type=float, default=0.0, help="of the instruction; 0: the checkpoint's")
    parser.add_argument("--joining", choices=JOININGS, default="rtc", help="how chunks join (default: rtc)")
    parser.add_argument("--latency", type=float, default=LATENCY, help=f"s that a chunk takes (default: {LATENCY})")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32", help="of the matrix products")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file of the report; else only the summary")
    options = parser.parse_args(arguments)
    for name, least in (("episodes", 1), ("seed", 0), ("n_action_steps", 0), ("denoising_steps", 0), ("latency", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name}={getattr(options, name)}: expected {least} or more")
    return options


def write(report: dict[str, Any], path: Path) -> None:
    """The report as JSON, at once whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the episodes were run, whatever came of them; 1 with a sentence if not; 130 when interrupted."""
    options = parse(arguments)
    try:
        report = rollout(options, Console(stderr=True))
        if options.output is not None:
            write(report, options.output)
    except (ValueError, OSError, OffscreenError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(summary(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
