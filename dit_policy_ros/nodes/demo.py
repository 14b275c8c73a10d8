"""The demo: a policy in one process drives a simulated arm in another, told in words which block to push.

This process is the operator. It starts the simulator and the policy node, runs the episodes (`demo_operator`), and then
writes `report.json`, a contact sheet and a video. The scenes' seeds are not those of training. Two controls show what
the policy goes by: `blank_images` takes its sight, `wrong_instruction` asks for another block in the same scenes.

    python -m dit_policy_ros.nodes.demo --episodes=20 --control=wrong_instruction
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import rclpy
from rclpy.signals import SignalHandlerOptions
from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.table import Table

from dit_policy_ros.nodes.demo_operator import DemoError, Operator
from dit_policy_ros.nodes.demo_pictures import Studio, contact_sheet, video_frames, write_video
from dit_policy_ros.nodes.demo_report import Episode, report
from dit_policy_ros.nodes.domain import claimed_domain, local_environment
from dit_policy_ros.nodes.parameters import DECLARATIONS
from dit_policy_ros.nodes.processes import Child, ChildDied
from dit_policy_ros.sim.simulation import OffscreenError
from dit_policy_ros.sim.task import CONTROLS, FIRST_SEED, instruction_for, target_of

_FPS = 15  # of the recorded scene, and so of the video


class Board:
    """The table of episodes: live on a terminal, a line an episode elsewhere."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._episodes: list[Episode] = []
        self._live = Live(console=console, auto_refresh=False)
        self._shown = 0.0

    def __enter__(self) -> Board:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
        else:
            self._console.print(self.table())

    def begin(self, episode: Episode) -> None:
        """Add an episode's row."""
        self._episodes.append(episode)
        self.progress()

    def progress(self) -> None:
        """Draw the rows as they stand, a few times a second at most."""
        if self._console.is_terminal and time.monotonic() - self._shown > 0.25:
            self._live.update(self.table(), refresh=True)
            self._shown = time.monotonic()

    def end(self, episode: Episode) -> None:
        """Show an episode's verdict."""
        self._shown = 0.0
        self.progress()
        if not self._console.is_terminal:
            mark = "done" if episode.success else "FAIL"
            self._console.print(
                f"episode {episode.number}/{self._total}  {mark}  {episode.instruction}: {episode.outcome}, "
                f"{episode.duration:.1f} s, {len(episode.chunk_seconds)} chunks",
                highlight=False,
            )

    def table(self) -> Table:
        """All episodes so far, and their sum."""
        done = [episode for episode in self._episodes if episode.over]
        table = Table(show_footer=True, title="Unseen scenes, one instruction each")
        table.add_column("episode", f"{len(done)} of {self._total}", justify="right")
        table.add_column("seed", justify="right")
        table.add_column("instruction")
        table.add_column("outcome", f"{sum(e.success for e in done)} succeeded")
        table.add_column("s", f"{sum(e.duration for e in done):.0f}", justify="right")
        table.add_column("chunks", str(sum(len(e.chunk_seconds) for e in done)), justify="right")
        table.add_column("rejected", str(sum(e.rejected for e in done)), justify="right")
        table.add_column("stale", str(sum(e.stale for e in done)), justify="right")
        for episode in self._episodes:
            table.add_row(*_cells(episode))
        return table


def _cells(episode: Episode) -> list[str]:
    style = "green" if episode.success else "red" if episode.over else "cyan"
    return [
        str(episode.number),
        str(episode.seed),
        episode.instruction,
        f"[{style}]{episode.outcome or 'running'}[/]",
        f"{episode.duration:.1f}",
        str(len(episode.chunk_seconds)),
        str(episode.rejected),
        str(episode.stale),
    ]


def children(options: argparse.Namespace, stack: ExitStack) -> list[Child]:
    """Start the simulator and the policy node; leaving `stack` stops them, the policy first."""
    python = (sys.executable, "-m")
    simulator = [*python, "dit_policy_ros.nodes.sim_node", "--ros-args", "-p", f"scene_state_rate:={_FPS}.0"]
    simulator += ["-p", f"blank_images:={str(options.control == 'blank_images').lower()}"]
    policy = [*python, "dit_policy_ros.nodes.policy_node", "--ros-args", "-p", f"checkpoint:={options.checkpoint}"]
    policy += ["-p", "recovery:=automatic"]
    for given in options.parameter:
        policy += ["-p", given]
    started = []
    for name, command in (("simulator", simulator), ("policy node", policy)):
        log = options.output / f"{name.replace(' ', '_')}.log"
        child = Child(name, command, log, {"OMP_NUM_THREADS": "1"})
        stack.callback(child.stop)
        started.append(child)
    return started


@contextmanager
def noted_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event and do no more, until the block ends.

    An exception raised between any two instructions may come where Python swallows it (after a fork, in a destructor),
    and the demo would go on; or where a process has been started and nobody knows yet that it must be stopped.
    """
    noted = threading.Event()
    before = {number: signal.signal(number, lambda *_: noted.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_episodes(options: argparse.Namespace, console: Console) -> tuple[list[Episode], dict[str, Any]]:
    """All episodes, and what they cost.

    seconds: from start to end; cpu_cores: used by each process, in cores; simulation_lost_s: real time that the
    simulator could not keep up with, which makes the policy look late.
    """
    with ExitStack() as stack:
        began = time.monotonic()
        interrupted = stack.enter_context(noted_signals())
        processes = children(options, stack)
        operator = Operator(processes, interrupted.is_set)
        stack.callback(operator.close)
        with console.status("starting the simulator, loading the policy"):
            operator.prepare()
        used, ready = [child.cpu_seconds for child in processes], time.monotonic()
        episodes = []
        with Board(console, options.episodes) as board:
            for number in range(options.episodes):
                target = target_of(number, options.control)
                episode = Episode(number + 1, options.seed + number, instruction_for(target))
                episodes.append(episode)
                board.begin(episode)
                operator.run(episode, target, board.progress)
                board.end(episode)
        end = time.monotonic()
        cores = {
            child.name: round((child.cpu_seconds - before) / (end - ready), 3)
            for child, before in zip(processes, used, strict=True)
        }
        cost = {"seconds": round(end - began, 1), "cpu_cores": cores, "simulation_lost_s": operator.simulation_lost}
    if interrupted.is_set():
        raise KeyboardInterrupt
    return episodes, cost


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the pool's processes too; it is for this one to end them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_pictures(options: argparse.Namespace, episodes: Sequence[Episode], title: str, console: Console) -> None:
    """`contact_sheet.png` of all episodes, and `demo.mp4` of the first few."""
    portraits, film = Studio(shadows=2048, samples=4), Studio(shadows=1024, samples=0)
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"), _ignore_interrupts)
        stack.callback(pool.shutdown, cancel_futures=True)
        with console.status("drawing the contact sheet"):
            sheet = contact_sheet(episodes, portraits.render, title, pool.map)
        sheet.save(options.output / "contact_sheet.png")
        shown = episodes[: options.video_episodes]
        if not shown:
            return
        video = partial(
            video_frames,
            render=film.render,
            cameras=("workspace", "wrist"),
            fps=_FPS,
            blank=options.control == "blank_images",
            map_in_order=pool.map,
        )
        frames = chain.from_iterable(video(episode) for episode in shown)
        total = sum(len(episode.trace) for episode in shown)
        watched = track(frames, "rendering the video", total, console=console, transient=True)
        write_video(options.output / "demo.mp4", watched, _FPS)


def run(options: argparse.Namespace) -> int:
    """The whole demo; 0 if its bars hold."""
    if not (options.checkpoint / "config.json").is_file():
        raise DemoError(
            f"no checkpoint in {options.checkpoint}; expected a folder with config.json, model.safetensors and the "
            "rest of a trained policy. `make demo-train` makes one, --checkpoint=FOLDER names another"
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    options.output.mkdir(parents=True, exist_ok=True)
    with claimed_domain() as domain:
        os.environ.update(local_environment(domain))  # this process's and, by inheritance, the children's
        rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
        try:
            episodes, cost = run_episodes(options, console)
        finally:
            rclpy.shutdown()
    context = {"checkpoint": str(options.checkpoint), "parameters": options.parameter, **cost}
    figures = report(episodes, options.control, context)
    path = options.output / "report.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    summary = (
        f"{figures['success']} of {figures['episodes']} blocks pushed over the line, "
        f"the wrong block moved {figures['wrong_block']} times"
    )
    write_pictures(options, episodes, summary, console)
    console.print(f"{summary}; figures and pictures in {options.output}/", highlight=False)
    if not figures["holds"]:
        console.print(
            f"That is below the bar. Chunks took {figures['chunk_ms']['p95']} ms (p95), {figures['rejected']} were "
            f"refused, the simulator gave up {figures['simulation_lost_s']} s: if that is much, the machine was busy.",
            highlight=False,
        )
    return 0 if figures["holds"] else 1


def _parameter(text: str) -> str:
    """A node's parameter in the form that ROS takes it, NAME:=VALUE."""
    name, equals, value = text.partition("=")
    if not equals or name not in (declaration.name for declaration in DECLARATIONS):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE of a parameter of the policy node")
    return f"{name}:={value}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"), help="folder of the policy")
    parser.add_argument("--episodes", type=int, default=20, help="how many scenes")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="of the first scene; the next has the next")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder of report, pictures, logs")
    parser.add_argument("--control", choices=CONTROLS, default="none", help="what the policy is deprived of")
    parser.add_argument(
        "--parameter",
        type=_parameter,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the policy node, as n_action_steps=4; may be given several times",
    )
    parser.add_argument(
        "--video-episodes", type=int, default=6, help="how many of the first go into the video; 0: none"
    )
    options = parser.parse_args(arguments)
    if options.episodes < 1:
        parser.error(f"--episodes={options.episodes}: expected 1 or more")
    if not 0 <= options.seed <= 2**32 - options.episodes:
        parser.error(f"--seed={options.seed}: expected 0 to {2**32 - options.episodes} for {options.episodes} scenes")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if the bars hold, 1 if not or if the demo could not be run, 130 when interrupted."""
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return run(options)
    except (DemoError, ChildDied, OffscreenError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; simulator and policy node are stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
