"""`make bench-convert`: what it costs to make datasets of bags, against LeRobot's own ways, and how it grows.

The bags are generated (bench_bag.py): two cameras 640x480 at 30 Hz, one raw and one JPEG, or both JPEG; seven joints at
100 Hz. Writes outputs/bench/convert.json; exits 1 if a bar does not hold. Twenty minutes and 6 GB of disk. ARGS=--quick
is a trial of two minutes: its figures mean little and go to convert-quick.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Event

import av
import numpy as np
from bench_bag import FPS, HEIGHT, JOINTS, WIDTH, Robot, movie, write_bag
from bench_convert_ways import WAYS, Work, cpu_per_frame, cpu_seconds, limit_cores
from bench_report import Row as Figure
from bench_report import figure_row, publish, ratio_row
from dit_policy_training.conversion.encoders import colour_encoder
from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.merging import merge_shards
from dit_policy_training.conversion.options import VideoOptions
from dit_policy_training.conversion.sampling import Row
from dit_policy_training.conversion.shards import ShardWriter
from dit_policy_training.conversion.workers import limit_threads
from dit_policy_training.conversion.yuv import to_yuv420p
from rich.console import Console

from dit_policy_ros.embodiment import Embodiment

CONVERT = [sys.executable, "-m", "dit_policy_training.convert"]
OURS, VERIFIED, STREAMING, USUAL = WAYS
POLL = 0.05  # s
GB = 1e9
FRAMES_A_SHARD = 7
CODECS = {"libsvtav1": VideoOptions(), "h264": VideoOptions(codec="h264", crf=18, preset="superfast")}


@dataclass(frozen=True)
class Size:
    """How much is converted. Seconds are of the bags."""

    piece: float  # for comparing CPU: short, so that the ways follow each other closely
    pairs: int
    bags: int  # of `bag` seconds each, for the workers
    bag: float
    turns: int  # of one worker and two
    long: float  # the long bag; a tenth of it is the short one
    shards: int


FULL = Size(piece=10.0, pairs=4, bags=4, bag=20.0, turns=2, long=600.0, shards=200)
QUICK = Size(piece=3.0, pairs=2, bags=2, bag=4.0, turns=1, long=30.0, shards=20)


@dataclass(frozen=True)
class Bench:
    """Where it happens, and of what size."""

    folder: Path
    size: Size
    console: Console

    def embodiment(self, robot: Robot) -> Path:
        """The robot's description as a file."""
        path = self.folder / f"{'-'.join(robot.transports)}.yaml"
        path.write_text(robot.embodiment())
        return path

    def bag(self, name: str, seconds: float, robot: Robot, seed: int = 0) -> Path:
        """A bag that is written once."""
        path = self.folder / "bags" / name
        if not path.exists():
            self.console.print(f"writing {name}: {seconds:g} s")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bag(path, seconds, robot, seed)
        return path


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def cost_rows(bench: Bench) -> list[Figure]:
    """CPU a frame, of the four ways in turn on the same bags, for each codec."""
    limit_threads(1)  # of OpenCV and pyarrow, as a worker does; lerobot's ways use neither in parallel
    return [row for codec, video in CODECS.items() for row in _cost_rows(bench, codec, video)]


def _cost_rows(bench: Bench, codec: str, video: VideoOptions) -> list[Figure]:
    robot, size = Robot(), bench.size
    embodiment = Embodiment.from_yaml(robot.embodiment(), "bench")
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(-1, size.pairs):  # the first one warms up: imports, encoders, the page cache
        bag = bench.bag(f"piece-{max(turn, 0)}", size.piece, robot, seed=max(turn, 0))
        for way in WAYS:
            seconds = cpu_per_frame(way, Work(bag, embodiment, video, bench.folder / "way"))
            bench.console.print(f"{codec}, {way}: {seconds * 1e3:.1f} ms CPU a frame")
            if turn >= 0:
                spent[way].append(seconds)
    how = (
        f"CPU of process and children a frame of both cameras (one raw, one JPEG), {size.piece:g} s of bag at a time; "
        f"{codec}, preset {video.preset}, crf {video.crf}, g {video.gop} everywhere; one reader and sampler feeds all"
    )
    rows = [
        ratio_row(f"{codec}: CPU against LeRobot's add_frame with PNG files", spent[USUAL], spent[OURS], 5.0, how),
        ratio_row(f"{codec}: CPU against LeRobot's streaming mode", spent[STREAMING], spent[OURS], 1.4, how),
    ]
    rows += [figure_row(f"{codec}: CPU a frame, {way}", median(spent[way]) * 1e3, "ms", how) for way in WAYS]
    alone = "the encoder alone, one thread, both cameras, their pictures as YUV in memory: no way costs less"
    rows.append(figure_row(f"{codec}: CPU a frame, the encoder alone", encoder_alone(bench, video) * 1e3, "ms", alone))
    return rows


def encoder_alone(bench: Bench, video: VideoOptions) -> float:
    """CPU seconds a frame of two cameras that nothing can go below with this codec."""
    frames = [to_yuv420p(picture) for picture in movie(round(min(bench.size.piece, 5.0) * FPS), seed=0)]
    encoder = colour_encoder(video, 1)
    context = av.CodecContext.create(encoder.codec, "w")
    context.options = dict(encoder.options)
    context.pix_fmt, context.height, context.width, context.framerate = "yuv420p", HEIGHT, WIDTH, FPS
    before = cpu_seconds()
    for pts, frame in enumerate(frames):
        frame.pts = pts
        context.encode(frame)
    context.encode()
    return 2 * (cpu_seconds() - before) / len(frames)


def worker_rows(bench: Bench) -> list[Figure]:
    """Frames a second of two workers, against one."""
    robot, size = Robot(), bench.size
    for number in range(size.bags):
        bench.bag(f"workers/{number}", size.bag, robot, seed=10 + number)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(size.turns):
        for workers in seconds:
            run = convert(bench, bench.folder / "bags" / "workers", robot, workers, f"--shard=1/1 --workers={workers}")
            seconds[workers].append(run.seconds)
            bench.console.print(f"{workers} workers: {run.seconds:.1f} s")
    frames = size.bags * size.bag * FPS
    how = (
        f"wall time of `convert --shard=1/1 --workers=` 1 and 2, start-up and all, {size.bags} bags of "
        f"{size.bag:g} s; a worker has one core (threads=1), so one worker runs on one core and two on two"
    )
    rows = [ratio_row("throughput of two workers against one", seconds[1], seconds[2], 1.7, how)]
    for workers, each in seconds.items():
        rows.append(figure_row(f"frames a second, {workers} workers", frames / median(each), "frames/s", how))
    return rows


def long_rows(bench: Bench) -> list[Figure]:
    """Memory of a worker, and that it does not grow; the time for a GB of JPEG."""
    size, jpeg = bench.size, Robot(("compressed", "compressed"))
    short = bench.bag("short", size.long / 10, jpeg)
    long = bench.bag("long", size.long, jpeg)
    mixed = bench.bag("mixed", size.long / 10, Robot())
    runs = {
        "short": convert(bench, short, jpeg, 2),
        "long": convert(bench, long, jpeg, 2),
        "mixed": convert(bench, mixed, Robot(), 2),
    }
    peak = {name: run.worker_peak for name, run in runs.items()}
    how = f"VmHWM of the worker process; bags of {size.long / 10:g} s and {size.long:g} s, two JPEG cameras 640x480"
    ratio = peak["long"] / peak["short"]
    gigabytes = size_of(long) / GB
    rate = runs["long"].seconds / gigabytes
    told = f"`convert` of a bag of {gigabytes:.2f} GB, both cameras JPEG (quality 90), to the checked dataset, 2 cores"
    return [
        figure_row("peak memory of a worker", max(peak.values()) / GB, "GB", f"{how}; the largest of all", 1.6),
        figure_row("peak memory, bag ten times longer", ratio, "times that of the short one", how, 1.1),
        figure_row("peak memory of a worker, one camera raw", peak["mixed"] / GB, "GB", how),
        figure_row("time for a GB of JPEG bag", rate, "s", told, 300.0),
        figure_row("memory of the process that merges and checks", runs["long"].main_peak / GB, "GB", told),
        figure_row("time for the short bag, one camera raw", runs["mixed"].seconds, "s", "convert, checked, 2 cores"),
    ]


def merge_rows(bench: Bench) -> list[Figure]:
    """What merging many shards costs, and that it does not grow faster than they do."""
    keys = ("observation.images.left", "observation.images.right")
    layout = Layout(30, "bench", dict.fromkeys(keys, (48, 64)), {}, JOINTS, JOINTS, ())
    picture = np.zeros((48, 64, 3), np.uint8)
    joints = np.zeros(len(JOINTS), np.float32)
    row = Row(0, "push", {**dict.fromkeys(keys, picture), "observation.state": joints}, joints, {})
    shards = [bench.folder / "shards" / str(number) for number in range(bench.size.shards)]
    for shard in shards:
        with ShardWriter(shard, layout, VideoOptions(codec="h264", preset="ultrafast")) as writer:
            for _ in range(FRAMES_A_SHARD):
                writer.add(row)
            writer.end(keep=True)
    spent = []
    for count in (len(shards) // 4, len(shards)):
        before = cpu_seconds()
        merge_shards(shards[:count], bench.folder / f"merged-{count}")
        spent.append((cpu_seconds() - before) / count)
    how = f"CPU a shard of one episode and two cameras; {len(shards)} shards, against a quarter of them"
    return [
        figure_row("merging, a shard", spent[1] * 1e3, "ms", how),
        figure_row("merging four times as many, a shard", spent[1] / spent[0], "times", how, 1.5),
    ]


@dataclass(frozen=True)
class Run:
    """One run of the command line: wall seconds, and peak memory in bytes of the largest worker and of the parent."""

    seconds: float
    worker_peak: int
    main_peak: int


def convert(bench: Bench, bags: Path, robot: Robot, cores: int, options: str = "") -> Run:
    """Runs it on that many cores, into a fresh output that is removed."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        arguments = [f"--bags={bags}", f"--embodiment={bench.embodiment(robot)}", f"--output={folder}/dataset"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*CONVERT, *arguments, *options.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=limit_cores(cores),
        )
        with peaks(process.pid) as found:
            shown, _ = process.communicate()
        seconds = time.perf_counter() - started
        if process.returncode:
            raise RuntimeError(f"convert {arguments} {options}:\n{shown.decode()}")
    main = found.pop(process.pid)
    return Run(seconds, max(found.values()), main)


@contextmanager
def peaks(parent: int) -> Iterator[dict[int, int]]:
    """Peak resident bytes by process, of a process and all that it starts; complete when the body is through."""
    found: dict[int, int] = {}
    over = Event()

    def watch() -> None:
        while not over.wait(POLL):
            for pid in tree(parent):
                found[pid] = max(found.get(pid, 0), peak_of(pid))

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield found
        finally:
            over.set()
            watching.result()


def tree(parent: int) -> list[int]:
    """A process and its descendants."""
    pids = [parent]
    for pid in pids:
        try:
            tasks = Path(f"/proc/{pid}/task").iterdir()
            pids += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue  # it ended
    return pids


def peak_of(pid: int) -> int:
    """Peak resident bytes of a process, 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 0 if every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a trial of two minutes")
    parser.add_argument("--only", help="cost, worker, long or merge")
    parser.add_argument("--folder", type=Path, help="where bags are written, and kept (default: a temporary one)")
    options = parser.parse_args(arguments)
    parts = {"cost": cost_rows, "worker": worker_rows, "long": long_rows, "merge": merge_rows}
    chosen = [parts[options.only]] if options.only else list(parts.values())
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(Path(folder), QUICK if options.quick else FULL, Console(stderr=True))
        rows = [row for part in chosen for row in part(bench)]
    name = "convert-quick" if options.quick else "convert"
    return publish(f"{name}-{options.only}" if options.only else name, rows)


if __name__ == "__main__":
    sys.exit(main())
