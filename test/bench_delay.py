"""`make bench-delay`: the demo's task with slow inference, and how chunks join: replace, blend, rtc.

Closed loop in simulated time (sim/closed_loop.py): each chunk takes the demo's own 30 ms and an added delay to come,
while the arm goes on. For each way of joining and each delay the share of successes, and what the arm feels where a
chunk takes over: the jump of velocity and acceleration (`runtime.joining.Seam`), and the arm's jerk in the 0.2 s after
(root mean square, of the simulated joints). Medians over all seams.

Writes outputs/bench/delay.json and, with --plot, docs/images/joining.png. With --checkpoint another policy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_report import Row, figure_row, publish
from rich.progress import track

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.engine import PolicyEngine
from dit_policy_ros.runtime.decisions import Settings
from dit_policy_ros.runtime.joining import JOININGS, Joining
from dit_policy_ros.sim.closed_loop import TICK_NS, ClosedLoop, Episode
from dit_policy_ros.sim.simulation import Simulation
from dit_policy_ros.sim.task import target_of

DELAYS_MS = (0, 100, 200, 300)
OWN_LATENCY = 0.03  # s, of the demo's policy on a CPU
FIRST_SEED = 700_000
JERK_TICKS = 20
JUDGED_MS, KEPT, HALF = 200, 0.95, 0.5


def figures(episodes: Sequence[Episode]) -> dict[str, float]:
    """What is told of a way of joining at a delay."""
    seams = [outcome.seam for episode in episodes for outcome in episode.outcomes if outcome.seam is not None]
    return {
        "success": sum(episode.success for episode in episodes) / len(episodes),
        "wrong block": sum(episode.wrong_block for episode in episodes) / len(episodes),
        "velocity jump": median(seam.velocity for seam in seams),
        "acceleration jump": median(seam.acceleration for seam in seams),
        "jerk": median(jerk for episode in episodes for jerk in jerks(episode)),
        "refused": sum(not outcome.sent for episode in episodes for outcome in episode.outcomes),
    }


def jerks(episode: Episode) -> list[float]:
    """Root mean square of the arm's jerk after each seam but the first, where the arm starts from rest; rad/s^3."""
    jerk = np.diff(np.array(episode.velocities), n=2, axis=0) / (TICK_NS / 1e9) ** 2
    windows = [jerk[tick : tick + JERK_TICKS] for tick in episode.seam_ticks[1:]]
    return [float(np.sqrt(np.mean(window**2))) for window in windows if len(window) == JERK_TICKS]


UNITS = {
    "success": "share of episodes",
    "wrong block": "share of episodes",
    "velocity jump": "rad/s",
    "acceleration jump": "rad/s^2",
    "jerk": "rad/s^3",
    "refused": "chunks",
}


def judged(table: dict[tuple[Joining, int], dict[str, float]], how: str) -> list[Row]:
    """The bars: rtc keeps its success at 200 ms, and its seam is at most half as rough as replace's."""
    kept = table["rtc", JUDGED_MS]["success"] / max(table["rtc", 0]["success"], 1e-9)
    ratio = table["rtc", JUDGED_MS]["velocity jump"] / table["replace", JUDGED_MS]["velocity jump"]
    row = figure_row(f"rtc, success kept at {JUDGED_MS} ms", kept, "share of that without delay", how)
    row |= {"bar": f">= {KEPT}", "holds": kept >= KEPT}
    name = f"velocity jump at {JUDGED_MS} ms, rtc over replace"
    return [row, figure_row(name, ratio, "ratio", how, at_most=HALF)]


def plot(table: dict[tuple[Joining, int], dict[str, float]], episodes: int, target: Path) -> None:
    """Success and roughness over the added delay."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {"success": "success (share)", "velocity jump": "velocity jump at a seam (rad/s)", "jerk": "jerk (rad/s³)"}
    figure, panels = pyplot.subplots(1, len(shown), figsize=(11, 3.4), layout="constrained")
    for panel, (name, label) in zip(panels, shown.items(), strict=True):
        for joining, style in zip(JOININGS, ("o-", "s--", "^-"), strict=True):
            values = [table[joining, delay][name] for delay in DELAYS_MS]
            panel.plot(DELAYS_MS, values, style, label=joining)
        panel.set(xlabel="added inference delay (ms)", title=label, ylim=(0, None), xticks=DELAYS_MS)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"How chunks join: {episodes} unseen scenes each, the demo's policy at 10 Hz")
    figure.savefig(target, dpi=110)


def main() -> int:
    """0 if the bars hold."""
    parser = argparse.ArgumentParser(prog="bench-delay", description=__doc__)
    parser.add_argument("--episodes", type=int, default=20, help="scenes for each way and delay")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"), help="folder of the policy")
    parser.add_argument("--plot", action="store_true", help="draw docs/images/joining.png as well")
    options = parser.parse_args()
    torch.manual_seed(0)
    policy = load_checkpoint(options.checkpoint, device="cpu")
    engine, embodiment = PolicyEngine(policy), Embodiment.load(options.checkpoint / "embodiment.yaml")
    table: dict[tuple[Joining, int], dict[str, float]] = {}
    with Simulation(camera_size=embodiment.cameras[0].width) as simulation:
        for joining, delay in track([(j, d) for d in DELAYS_MS for j in JOININGS], "episodes"):
            settings = Settings(policy.config.n_action_steps, joining=joining, max_consecutive_rejections=100)
            loop = ClosedLoop(engine, embodiment, simulation, OWN_LATENCY + delay / 1e3)
            table[joining, delay] = figures(
                [
                    loop.run(FIRST_SEED + number, target_of(FIRST_SEED + number), settings)
                    for number in range(options.episodes)
                ]
            )
    how = f"{options.episodes} unseen scenes each, closed loop, simulated time, own latency {OWN_LATENCY * 1e3:.0f} ms"
    rows: list[Row] = judged(table, how)
    for (joining, delay), values in table.items():
        for name, value in values.items():
            rows.append(figure_row(f"{joining}, {delay} ms: {name}", value, UNITS[name], how))
    if options.plot:
        plot(table, options.episodes, Path("docs/images/joining.png"))
    more: dict[str, Any] = {"checkpoint": str(options.checkpoint)}
    return publish("delay", rows, **more)


if __name__ == "__main__":
    sys.exit(main())
