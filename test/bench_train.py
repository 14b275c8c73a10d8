"""`make bench-train`: our trainer against lerobot-train, the same model, dataset, batch, workers, threads, precision.

Both commands run whole, each in a process of its own, and take turns: a block of steps of one while the other is frozen
with its workers (SIGSTOP). In our loop are the data, forward, backward, the cut of the gradients, Adam, the moving
average of the weights (which lerobot-train has not), the progress and the rows of metrics.jsonl and TensorBoard; in
theirs all that `train()` does between two steps. Checkpoints and validation are in neither. Ours decodes the pictures
once before its first step, which is a row of its own; theirs decodes them in each epoch, in its workers.

Memory is measured apart, each loop alone on the machine: the largest sum of its processes' PSS, or on a GPU
torch.cuda.max_memory_allocated. Writes outputs/bench/train.json; exits 1 if a bar does not hold. ARGS=--quick tries the
script in a minute or two, with sizes whose figures mean nothing; ARGS=--device=cuda runs on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from bench_report import Row, figure_row, publish, ratio_row, write
from bench_train_loops import Block

ROOT = Path(__file__).parents[1]
WORK = Path("outputs/bench/train")
DEMO_DATASET = Path("outputs/demo-train/dataset")
WORKERS = 1
NAMES = {"ours": "ours", "lerobot": "lerobot-train"}


@dataclass(frozen=True)
class Size:
    """What is trained, on what, and how it is measured."""

    name: str
    picture: int  # (H, W) of the dataset's are scaled to this, and the crop is what the ViT takes
    crop: int
    vision: dict[str, int]
    text: dict[str, int]
    hidden_dim: int
    layers: int
    heads: int
    batch: int
    n_obs_steps: int
    horizon: int
    n_action_steps: int
    block: int  # steps
    blocks: int
    faster: float | None  # bar
    demo: bool  # the demo's dataset, or one made here


DEMO = Size(
    name="the demo's size",
    picture=72,
    crop=64,
    vision={"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"patch_size": 8},
    text={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    hidden_dim=128,
    layers=4,
    heads=4,
    batch=48,
    n_obs_steps=1,
    horizon=16,
    n_action_steps=8,
    block=5,
    blocks=12,
    faster=1.3,
    demo=True,
)
VIT_B = Size(
    name="ViT-B",
    picture=256,
    crop=224,
    vision={"patch_size": 16},  # the rest of transformers' defaults is ViT-B's
    text={},  # and CLIP-B's
    hidden_dim=512,
    layers=6,
    heads=8,
    batch=4,
    n_obs_steps=2,
    horizon=32,
    n_action_steps=24,
    block=1,
    blocks=9,
    faster=1.05,
    demo=False,
)
QUICK = [
    replace(DEMO, batch=8, block=2, blocks=2, faster=None),
    replace(VIT_B, name="a small ViT", vision=DEMO.vision, text=DEMO.text, picture=72, crop=64, blocks=2, faster=None),
]


# --- what both are given ---


def make_clip(folder: Path, size: Size) -> Path:
    """Both towers of a CLIP with random weights and a tokenizer, as CLIPModel.save_pretrained leaves them."""
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    from dit_policy_ros.policy.tiny_clip import DEMO_INSTRUCTIONS, make_tokenizer

    tokenizer = make_tokenizer(list(DEMO_INSTRUCTIONS))
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text, vision = CLIPTextConfig(**size.text, **ends), CLIPVisionConfig(image_size=size.crop, **size.vision)
    torch.manual_seed(0)
    weights = CLIPTextModel(text).state_dict() | CLIPVisionModel(vision).state_dict()
    folder.mkdir(parents=True)
    CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_demo_dataset(folder: Path) -> Path:
    """A few episodes of the demo's expert, recorded and converted as tools/demo_train.sh does."""
    record = ["dit_policy_ros.sim.record", f"--output={folder / 'bags'}", "--episodes=6", "--overwrite"]
    convert = ["dit_policy_training.convert", f"--bags={folder / 'bags'}", f"--output={folder / 'dataset'}"]
    convert += ["--embodiment=config/embodiments/sim_arm.yaml", "--overwrite=true", "--video.codec=h264"]
    convert += ["--controller.interpolate_from_desired_state=true", "--video.pix_fmt=yuv444p", "--video.crf=18"]
    for command in (record, [*convert, "--video.preset=superfast"]):
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
    return folder / "dataset"


def make_dataset(folder: Path, picture: int, episodes: int = 4, frames: int = 60) -> Path:
    """A LeRobotDataset by LeRobot's own writer: one camera, 7 joints, a bright square on noise that moves with them."""
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    camera, joints = "observation.images.camera", [f"joint{i}" for i in range(7)]
    vector = {"dtype": "float32", "shape": (7,), "names": joints}
    dataset = LeRobotDataset.create(
        "local/bench",
        10,
        {
            camera: {"dtype": "video", "shape": (picture, picture, 3), "names": ["height", "width", "channels"]},
            "observation.state": vector,
            "action": vector,
        },
        root=folder,
        video_backend="pyav",
        rgb_encoder=RGBEncoderConfig("h264", "yuv420p", 2, 23, None),
    )
    rng = np.random.default_rng(0)
    background = rng.integers(0, 256, (picture, picture, 3), dtype=np.uint8)
    for episode in range(episodes):
        for frame in range(frames):
            angle = np.float32(np.sin(0.1 * frame + episode))
            left = int((angle + 1) / 2 * 0.8 * picture)
            image = background.copy()
            image[left : left + picture // 5, left : left + picture // 5] = (255, 40 * episode, 0)
            state = np.full(7, angle, np.float32) + rng.normal(0, 0.01, 7).astype(np.float32)
            task = f"push the {('red', 'green', 'blue')[episode % 3]} block over the line"
            dataset.add_frame({camera: image, "observation.state": state, "action": state + 0.1, "task": task})
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()
    return folder


def materials(size: Size, folder: Path) -> tuple[Path, Path]:
    """The dataset and the CLIP of a size, made unless they are there."""
    folder = folder / size.name.replace(" ", "_").replace("'", "")
    shutil.rmtree(folder, ignore_errors=True)
    clip = make_clip(folder / "clip", size)
    if not size.demo:
        return make_dataset(folder / "dataset", size.picture), clip
    if (DEMO_DATASET / "meta/info.json").exists():
        return DEMO_DATASET, clip
    return make_demo_dataset(folder), clip


def commands(size: Size, dataset: Path, clip: Path, device: str, amp: bool, output: Path) -> dict[str, list[str]]:
    """The arguments of both trainers: one model, one optimizer, one batch."""
    picture, crop = [size.picture] * 2, [size.crop] * 2
    ours = {
        "dataset_path": dataset,
        "output_dir": output / "ours",
        "batch_size": size.batch,
        "train_steps": 100000,
        "save_freq": 100000,
        "log_freq": 20,
        "num_workers": WORKERS,
        "device": device,
        "use_amp": str(amp).lower(),
        "validation.episode_share": 0,
        "tracking.pictures": "false",
        "optimizer.type": "adam",
        "optimizer.lr": 1e-4,
        "optimizer.weight_decay": 1e-4,
        "scheduler.warmup_steps": 60,
        "policy.objective.type": "flow_matching",
        "policy.n_obs_steps": size.n_obs_steps,
        "policy.horizon": size.horizon,
        "policy.n_action_steps": size.n_action_steps,
        "policy.transformer.hidden_dim": size.hidden_dim,
        "policy.transformer.num_layers": size.layers,
        "policy.transformer.num_heads": size.heads,
        "policy.observation_encoder.vision.type": "clip",
        "policy.observation_encoder.vision.backbone": clip,
        "policy.observation_encoder.vision.resize_shape": picture,
        "policy.observation_encoder.vision.crop_shape": crop,
        "policy.observation_encoder.text.type": "clip",
        "policy.observation_encoder.text.model": clip,
    }
    theirs = {
        "dataset.repo_id": "local/bench",
        "dataset.root": dataset,
        "dataset.video_backend": "pyav",
        "output_dir": output / "lerobot",
        "batch_size": size.batch,
        "steps": 100000,
        "save_freq": 100000,
        "log_freq": 20,
        "num_workers": WORKERS,
        "wandb.enable": "false",
        "policy.type": "multi_task_dit",
        "policy.push_to_hub": "false",
        "policy.device": device,
        "policy.use_amp": str(amp).lower(),
        "policy.objective": "flow_matching",
        "policy.optimizer_lr": 1e-4,
        "policy.optimizer_betas": [0.9, 0.95],
        "policy.optimizer_weight_decay": 1e-4,
        "policy.scheduler_warmup_steps": 60,
        "policy.n_obs_steps": size.n_obs_steps,
        "policy.horizon": size.horizon,
        "policy.n_action_steps": size.n_action_steps,
        "policy.hidden_dim": size.hidden_dim,
        "policy.num_layers": size.layers,
        "policy.num_heads": size.heads,
        "policy.vision_encoder_name": clip,
        "policy.text_encoder_name": clip,
        "policy.image_resize_shape": picture,
        "policy.image_crop_shape": crop,
        "policy.do_mask_loss_for_padding": "true",
    }
    return {
        name: [f"--{key}={value}" for key, value in arguments.items()]
        for name, arguments in (("ours", ours), ("lerobot", theirs))
    }


# --- the processes ---


class Loop:
    """A trainer in a process group of its own, frozen whenever it is not asked for steps."""

    def __init__(self, kind: str, arguments: Sequence[str], threads: int, log: Path):
        tokens, self._tokens = os.pipe()
        self._reports, reports = os.pipe()
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "test/bench_train_loops.py"), kind, str(tokens), str(reports), *arguments],
                cwd=ROOT,
                env=os.environ | offline,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(tokens, reports),
                start_new_session=True,
            )
        os.close(tokens)
        os.close(reports)
        self._log, self._lines = log, os.fdopen(self._reports)
        self.start = self._report()

    def run(self, steps: int) -> Block:
        """A block of steps."""
        os.killpg(self.process.pid, signal.SIGCONT)
        os.write(self._tokens, f"{steps}\n".encode())
        return self._report()

    def _report(self) -> Block:
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"the trainer ended; it said:\n{self._log.read_text()[-4000:]}")
        os.killpg(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)
        return Block(**json.loads(line))

    def close(self) -> None:
        """Ends it and its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._lines.close()
        os.close(self._tokens)


@contextmanager
def running(kind: str, arguments: Sequence[str], threads: int, folder: Path) -> Iterator[Loop]:
    """A loop after its first step."""
    output = next(Path(each.partition("=")[2]) for each in arguments if each.startswith("--output_dir="))
    shutil.rmtree(output, ignore_errors=True)  # lerobot-train refuses a folder that is there
    loop = Loop(kind, arguments, threads, folder / f"{kind}.log")
    try:
        yield loop
    finally:
        loop.close()


def group_pss(group: int) -> int:
    """The PSS of a process group, bytes: its own pages, and its share of those it shares with others."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError, IndexError):  # it ended meanwhile
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(status[2]) == group:
                rollup = (entry / "smaps_rollup").read_text()
                total += 1024 * int(rollup.partition("\nPss:")[2].split()[0])
    return total


class Peak:
    """Samples a process group's memory until it is stopped."""

    def __init__(self, group: int, interval: float = 0.1):
        self.bytes = 0
        self._group, self._interval = group, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.bytes = max(self.bytes, group_pss(self._group))

    def stop(self) -> int:
        """The largest it was."""
        self._stop.set()
        self._thread.join()
        return max(self.bytes, group_pss(self._group))


# --- the figures ---


def peak_memory(kind: str, arguments: Sequence[str], threads: int, folder: Path, steps: int) -> int:
    """The most that a loop takes in some steps, alone: of the GPU's memory if it uses it, else PSS."""
    with running(kind, arguments, threads, folder) as loop:
        peak = Peak(loop.process.pid)
        block = loop.run(steps)
        return block.gpu_bytes or peak.stop()


def measure(size: Size, folder: Path, device: str, amp: bool) -> list[Row]:
    """All rows of a size."""
    dataset, clip = materials(size, folder)
    given = commands(size, dataset, clip, device, amp, folder)
    threads = max((os.cpu_count() or 1) - WORKERS, 1)
    how = f"batch {size.batch}, {size.n_obs_steps} observation steps, {dataset}, {WORKERS} worker process, {threads} "
    how += f"torch thread{'s' * (threads > 1)}, {'bf16' if amp else 'fp32'} on {device}"
    steps = max(3, size.block)
    peaks = {kind: peak_memory(kind, given[kind], threads, folder, steps) for kind in NAMES}
    blocks: dict[str, list[Block]] = {kind: [] for kind in NAMES}
    with (
        running("ours", given["ours"], threads, folder) as ours,
        running("lerobot", given["lerobot"], threads, folder) as theirs,
    ):
        loops = {"ours": ours, "lerobot": theirs}
        for loop in loops.values():
            loop.run(size.block)  # a warm-up
        for _ in range(size.blocks):
            for kind, loop in loops.items():
                blocks[kind].append(loop.run(size.block))
        starts = {kind: loop.start for kind, loop in loops.items()}
    check_same_model(starts)
    return rows_of(size, blocks, starts, peaks, how, device)


def check_same_model(starts: dict[str, Block]) -> None:
    """Raises RuntimeError unless both train as many numbers, but for the norm that LeRobot declares and never uses."""
    ours, theirs = (starts[kind].parameters for kind in NAMES)
    if not ours <= theirs <= 1.001 * ours:
        raise RuntimeError(f"not the same model: ours trains {ours} numbers, lerobot-train {theirs}")


def rows_of(
    size: Size,
    blocks: dict[str, list[Block]],
    starts: dict[str, Block],
    peaks: dict[str, int],
    how: str,
    device: str,
) -> list[Row]:
    """The rows of what was measured."""
    seconds = {kind: [block.seconds for block in each] for kind, each in blocks.items()}
    turns = f"{size.block} step{'s' * (size.block > 1)} of each in turn; {how}"
    rows = [ratio_row(f"{size.name}: against lerobot-train", seconds["lerobot"], seconds["ours"], size.faster, turns)]
    for kind, name in NAMES.items():
        rate = size.block * size.batch / statistics.median(seconds[kind])
        rows.append(figure_row(f"{size.name}: {name}", rate, "samples/s", turns))
    where = "torch.cuda.max_memory_allocated" if device != "cpu" else "PSS of all its processes"
    bar = 1.0 if size.faster else None
    ratio = peaks["ours"] / peaks["lerobot"]
    rows.append(
        figure_row(f"{size.name}: peak memory", ratio, "of lerobot-train's", f"{where}, each alone; {how}", at_most=bar)
    )
    for kind, name in NAMES.items():
        how_much = f"{where}, alone; {starts[kind].parameters / 1e6:.1f} M numbers trained"
        how_much += ", their average among them" if kind == "ours" else ""
        rows.append(figure_row(f"{size.name}: peak memory, {name}", peaks[kind] / 1e6, "MB", how_much))
    for kind, name in NAMES.items():
        share = sum(block.waited for block in blocks[kind]) / sum(seconds[kind])
        rows.append(
            figure_row(f"{size.name}: waiting for data, {name}", 100 * share, "%", "until a batch is handed over")
        )
    rows.append(
        figure_row(
            f"{size.name}: decoding once", starts["ours"].decoding, "s", "ours, before its first step; no ratio has it"
        )
    )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 0 if every bar holds, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a trial of the script")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", action="store_true", help="bf16 on both sides")
    parser.add_argument("--only", choices=("demo", "vit-b"), help="one of the two sizes")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else [DEMO, VIT_B]
    if options.only:
        sizes = [size for size in sizes if size.demo == (options.only == "demo")]
    started = time.perf_counter()
    part = "train" + ("-quick" if options.quick else "") + ("" if options.device == "cpu" else "-cuda")
    device = None
    if options.device != "cpu":
        import torch

        device = torch.cuda.get_device_name()
    rows: list[Row] = []
    for size in sizes:
        rows += measure(size, ROOT / WORK, options.device, options.amp)
        write(part, rows, device=device)  # what is measured stays, whatever becomes of the next
    print(f"measured in {(time.perf_counter() - started) / 60:.1f} minutes")
    return publish(part, rows, device=device)


if __name__ == "__main__":
    sys.exit(main())
