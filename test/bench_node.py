"""`make bench-node`: what the policy node costs beside the policy, and how steady its threads are.

Real DDS between three processes: a robot with two 640x480 cameras at 30 Hz (raw, then JPEG) and joint states at 100 Hz
(bench_robot.py), the node with a small untrained policy, and this one. Measured:

- waiting: CPU of the active node before there is an instruction, all streams coming in.
- own share: CPU of a chunk beside encoder and denoising: window, decoding, joining, gate, messages.
- lateness: how late the beat's calls are (watchdogs, stops, position streams) while inference runs, and while it does
  not, in the same run.
- memory: the slope of the resident set over --minutes with inference running.
- seams: the jump where one chunk takes over from another, with the demo's policy and the simulator, as published.

Writes outputs/bench/node.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from bench_report import Row, figure_row, publish, write
from bench_robot import CAMERAS, HEIGHT, WIDTH
from diagnostic_msgs.msg import DiagnosticArray
from dit_policy_msgs.msg import ActionChunk, SceneState
from dit_policy_msgs.srv import ResetScene, SetInstruction
from listener import Listener
from policy_fixtures import INSTRUCTIONS, demo_config, make_stats
from rich.progress import track

from dit_policy_ros.nodes import demo
from dit_policy_ros.nodes.domain import claimed_domain, local_environment
from dit_policy_ros.nodes.processes import Child
from dit_policy_ros.policy.checkpoint import save_checkpoint
from dit_policy_ros.policy.configuration import Feature
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.tiny_clip import make_tiny_clip
from dit_policy_ros.runtime.gate import Verdict
from dit_policy_ros.runtime.joining import JOININGS

ROOT = Path(__file__).parents[1]
CHUNK, DIAGNOSTICS, NODE = "dit_policy/action_chunk", "/diagnostics", "/dit_policy"
OWN_MS, WAITING_CORES, LATENESS_RATIO, GROWTH_MB = 4.0, 0.25, 3.0, 5.0


def checkpoint(folder: Path, transport: str) -> Path:
    """An untrained policy for the bench's robot whose actions stay within 2 mrad of the measured joints."""
    make_tiny_clip(folder / "clip")
    cameras = {f"observation.images.{name}": Feature("VISUAL", (3, HEIGHT, WIDTH)) for name in CAMERAS}
    features = cameras | {"observation.state": Feature("STATE", (7,))}
    config = demo_config(str(folder / "clip"), tasks=INSTRUCTIONS, input_features=features)
    stats = make_stats(config)
    stats["action"] = {"min": [-0.002] * 7, "max": [0.002] * 7, "mean": [0.0] * 7, "std": [0.001] * 7}
    target = folder / f"policy_{transport}"
    save_checkpoint(target, MultitaskDiTPolicy(config, stats), embodiment(transport), "a benchmark's")
    return target


def embodiment(transport: str) -> str:
    """The demo's arm with the bench's cameras."""
    text = (ROOT / "config/embodiments/sim_arm.yaml").read_text()
    lines = text.splitlines()
    for number, line in enumerate(lines):
        name = line.strip().partition(":")[0]
        if name in CAMERAS:
            size = f"width: {WIDTH}, height: {HEIGHT}"
            lines[number] = f"  {name}: {{topic: {CAMERAS[name]}, transport: {transport}, {size}, max_age: 0.3}}"
    return "\n".join(lines) + "\n"


class Bench:
    """The node under test with what is around it."""

    def __init__(self, node: Child, listener: Listener) -> None:
        self.node = node
        self.listener = listener

    def transition(self, name: str) -> None:
        """Ask for a lifecycle transition, and insist."""
        assert self.listener.transition(name), self.node.last_lines()

    def instruct(self, text: str) -> None:
        """Tell the node what to do."""
        request = SetInstruction.Request(instruction=text)
        assert self.listener.call(SetInstruction, "dit_policy/set_instruction", request).success

    def set(self, **parameters: object) -> None:
        """Change live parameters."""
        for name, value in parameters.items():
            result = self.listener.set_parameter("dit_policy", name, value)
            assert result.successful, result.reason

    def cores(self, seconds: float) -> float:
        """CPU that the node uses from now on, in cores."""
        used, began = self.node.cpu_seconds, time.monotonic()
        time.sleep(seconds)
        return (self.node.cpu_seconds - used) / (time.monotonic() - began)

    def diagnostics(self) -> dict[str, str]:
        """The next values of the node in /diagnostics."""
        while True:
            (array,) = self.listener.next(DIAGNOSTICS)
            for status in array.status:
                if status.name == NODE:
                    return {pair.key: pair.value for pair in status.values}

    def chunks(self, seconds: float) -> list[ActionChunk]:
        """The chunks of the next seconds."""
        seen = len(self.listener.heard[CHUNK])
        time.sleep(seconds)
        return self.listener.heard[CHUNK][seen:]

    def resident_mb(self) -> float:
        """Resident memory, MB."""
        for line in Path(f"/proc/{self.node.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("the process has no resident set")


@contextmanager
def running(folder: Path, transport: str) -> Iterator[Bench]:
    """The robot and the node, configured."""
    with ExitStack() as stack:
        command = [sys.executable, str(ROOT / "test/bench_robot.py"), transport]
        robot = Child("robot", command, folder / "robot.log")
        stack.callback(robot.stop)
        settings = {"checkpoint": checkpoint(folder, transport), "recovery": "automatic", "n_action_steps": 4}
        arguments = [word for name, value in settings.items() for word in ("-p", f"{name}:={value}")]
        command = [sys.executable, "-m", "dit_policy_ros.nodes.policy_node", "--ros-args", *arguments]
        node = Child("policy node", command, folder / "node.log", {"OMP_NUM_THREADS": "1"})
        stack.callback(node.stop)
        listener = Listener(node, {CHUNK: ActionChunk, DIAGNOSTICS: DiagnosticArray})
        stack.callback(listener.close)
        bench = Bench(node, listener)
        bench.transition("configure")
        yield bench


def measured(transport: str, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """The figures of the node with cameras of one transport."""
    kind = "JPEG" if transport == "compressed" else "raw"
    with running(folder, transport) as bench:
        bench.transition("activate")
        time.sleep(3)
        waiting = bench.cores(options.seconds)
        bench.instruct(INSTRUCTIONS[0])
        time.sleep(3)
        working = bench.cores(2 * options.seconds)
        values = bench.diagnostics()
        how = f"2 cameras {WIDTH}x{HEIGHT} {kind} at 30 Hz, joint states at 100 Hz, real DDS, OMP_NUM_THREADS=1"
        yield figure_row(f"{kind}: CPU active and waiting", waiting, "cores", how, WAITING_CORES)
        own = float(values["own_cpu_p50"]) * 1e3
        how_own = f"{how}; median over the latest 200 chunks, a chunk each 0.4 s"
        yield figure_row(f"{kind}: own share of a chunk", own, "ms of CPU", how_own, OWN_MS)
        yield figure_row(f"{kind}: CPU with a chunk each 0.4 s", working, "cores", how)
        late, idle = (float(values[f"beat.lateness_p99.{when}"]) * 1e3 for when in ("inference", "idle"))
        how_late = f"{how}; p99 {late:.2f} ms while inference runs, {idle:.2f} ms while not"
        yield figure_row(f"{kind}: beat's lateness, p99 ratio", late / idle, "ratio", how_late, LATENESS_RATIO)
        yield figure_row(f"{kind}: latency of a chunk, p95", float(values["inference_p95"]) * 1e3, "ms", how)


def memory(folder: Path, minutes: float) -> Iterator[Row]:
    """The slope of the resident set; its first minute is left out, in which allocators still fill their pools."""
    times, sizes = [], []
    with running(folder, "raw") as bench:
        bench.transition("activate")
        bench.instruct(INSTRUCTIONS[0])
        time.sleep(min(60.0, minutes * 15))
        for _ in track(range(max(3, round(minutes * 12))), "memory", transient=True):
            times.append(time.monotonic() / 60)
            sizes.append(bench.resident_mb())
            time.sleep(5)
    slope = float(np.polyfit(times, sizes, 1)[0])
    span = times[-1] - times[0]
    how = f"raw cameras, a chunk each 0.4 s; line through {len(times)} samples of VmRSS over {span:.1f} min, "
    how += f"{sizes[0]:.1f} to {sizes[-1]:.1f} MB"
    yield figure_row("memory: slope", slope, "MB a minute", how)
    yield figure_row("memory: growth in 20 minutes at that slope", max(0.0, slope * 20), "MB", how, GROWTH_MB)


def seams(folder: Path, seconds: float) -> Iterator[Row]:
    """The jumps where chunks take over, as the node publishes them, with the demo's policy in the simulator."""
    with ExitStack() as stack:
        simulator, policy = demo.children(demo.parse([f"--output={folder}"]), stack)
        topics = {CHUNK: ActionChunk, "scene_state": SceneState}
        listener = Listener(policy, topics)
        stack.callback(listener.close)
        bench = Bench(policy, listener)
        bench.transition("configure")
        listener.wait(lambda: listener.heard["scene_state"], f"the {simulator.name}'s first scene", 60)
        for joining in JOININGS:
            bench.set(joining=joining)
            found: list[ActionChunk] = []
            for seed in range(3):
                assert listener.call(ResetScene, "reset_scene", ResetScene.Request(seed=800_000 + seed)).success
                bench.instruct(INSTRUCTIONS[seed])
                time.sleep(0.5)
                bench.transition("activate")
                found += bench.chunks(seconds)
                bench.transition("deactivate")
            yield from seam_rows(joining, found)


def seam_rows(joining: str, chunks: Sequence[ActionChunk]) -> Iterator[Row]:
    """A row for each kind of jump."""
    told = [chunk for chunk in chunks if chunk.verdict == Verdict.ACCEPTED and not np.isnan(chunk.seam_velocity)]
    how = f"median of {len(told)} seams, the demo's policy and the simulator over DDS, as on ~/action_chunk"
    for what, unit in (("position", "rad"), ("velocity", "rad/s"), ("acceleration", "rad/s^2")):
        value = median(getattr(chunk, f"seam_{what}") for chunk in told)
        yield figure_row(f"seam, {joining}: jump of {what}", value, unit, how)


def main() -> int:
    """0 if the bars hold."""
    parser = argparse.ArgumentParser(prog="bench-node", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the CPU is measured at a time")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long the memory is watched; 0: not at all")
    options = parser.parse_args()
    rows: list[Row] = []
    with claimed_domain() as domain, tempfile.TemporaryDirectory() as folder:
        os.environ.update(local_environment(domain))
        for transport in ("raw", "compressed"):
            rows += measured(transport, Path(folder), options)
        rows += seams(Path(folder) / "demo", min(6.0, options.seconds))
        if options.minutes:
            write("node", rows)  # in case that the long part is not waited for
            rows += memory(Path(folder), options.minutes)
    return publish("node", rows)


if __name__ == "__main__":
    sys.exit(main())
