"""`make bench-policy`: the engine against LeRobot's `multi_task_dit`, same process, weights and noise, on the CPU.

Writes outputs/bench/policy.json and docs/images/policy_speed.png; exits 1 if a bar does not hold. ARGS="--quick" runs
everything in a tiny size in seconds, to try the script: its figures mean nothing and are written to policy-quick.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_report import Row, figure_row, interleave, publish, ratio_row
from torch import Tensor

from dit_policy_ros.policy.checkpoint import load_checkpoint, save_checkpoint
from dit_policy_ros.policy.configuration import (
    CLIP_MEAN,
    CLIP_STD,
    ClipTextConfig,
    ClipVisionConfig,
    DiffusionConfig,
    Feature,
    ObservationEncoderConfig,
    PolicyConfig,
    TransformerConfig,
)
from dit_policy_ros.policy.engine import PolicyEngine
from dit_policy_ros.policy.fast_transformer import FastTransformer
from dit_policy_ros.policy.interop.write import to_lerobot
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.objectives import Diffusion
from dit_policy_ros.policy.sampling import make_plan
from dit_policy_ros.policy.tiny_clip import DEMO_INSTRUCTIONS, make_tokenizer
from dit_policy_ros.policy.transformer import DiffusionTransformer

ROOT = Path(__file__).parents[1]
CAMERAS = ("observation.images.workspace", "observation.images.wrist")
JOINTS, STEPS = 7, 10
TASK = DEMO_INSTRUCTIONS[0]


@dataclass(frozen=True)
class Size:
    """What is built, and how often each thing is run."""

    image: int
    vision: dict[str, Any]
    text: dict[str, Any]
    transformer: TransformerConfig
    step_repeats: int
    chunk_repeats: int
    batches: tuple[int, ...]
    growth: dict[str, tuple[int, ...]]


FULL = Size(
    image=224,
    vision={"patch_size": 16},  # the rest of transformers' defaults is ViT-B's
    text={},
    transformer=TransformerConfig(),
    step_repeats=41,
    chunk_repeats=9,
    batches=(1, 8, 64),
    growth={
        "horizon": (16, 32, 64, 128),
        "layers": (2, 4, 6, 8, 12),
        "cameras": (1, 2, 3, 4),
        "steps": (5, 10, 25, 50),
    },
)
QUICK = Size(
    image=32,
    vision={
        "patch_size": 8,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    transformer=TransformerConfig(hidden_dim=64, num_layers=2, num_heads=4),
    step_repeats=3,
    chunk_repeats=2,
    batches=(1, 2),
    growth={"horizon": (16, 32), "layers": (1, 2), "cameras": (1, 2), "steps": (5, 10)},
)


@dataclass
class Pair:
    """The same policy twice, ours and LeRobot's, and what both are given."""

    ours: MultitaskDiTPolicy
    theirs: Any
    native: Path
    lerobot: Path

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.ours.device


def make_policy(size: Size) -> MultitaskDiTPolicy:
    """The default architecture for two cameras and 7 joints; random weights, adaLN's among them."""
    tokenizer = make_tokenizer(DEMO_INSTRUCTIONS)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    features = {key: Feature("VISUAL", (3, size.image, size.image)) for key in CAMERAS}
    vision = ClipVisionConfig(
        resize_shape=None,
        crop_shape=(size.image, size.image),
        backbone_config={"image_size": size.image, **size.vision},
    )
    config = PolicyConfig(
        input_features=features | {"observation.state": Feature("STATE", (JOINTS,))},
        output_features={"action": Feature("ACTION", (JOINTS,))},
        observation_encoder=ObservationEncoderConfig(vision, ClipTextConfig(model_config=size.text | ends)),
        transformer=size.transformer,
        objective=DiffusionConfig(timestep_spacing="leading", denoising_steps=STEPS),  # LeRobot's spacing
        tasks=list(DEMO_INSTRUCTIONS),
    )
    low, high = [-1.0] * JOINTS, [1.0] * JOINTS
    one = {"min": low, "max": high, "mean": [0.0] * JOINTS, "std": high}
    torch.manual_seed(0)
    policy = MultitaskDiTPolicy(config, {"observation.state": one, "action": one}, tokenizer).eval()
    for block in policy.noise_predictor.transformer_blocks:
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)  # zeros would leave nothing to compare
    return policy


def make_pair(size: Size, folder: Path, device: str = "cpu") -> Pair:
    """Our policy saved, exported to LeRobot's format and loaded by LeRobot: the same weights on both sides."""
    from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy

    policy = make_policy(size)
    native, lerobot = folder / "native", folder / "clip-lerobot"
    save_checkpoint(native, policy, EMBODIMENT, "for a benchmark\n")
    to_lerobot(native, lerobot)
    theirs = MultiTaskDiTPolicy.from_pretrained(lerobot).eval().to(device)
    return Pair(policy.to(device), theirs, native, lerobot)


EXACT = 1e-4
"""The most that an action in [-1, 1] may differ by in fp32, where only the order of sums does."""

EMBODIMENT = (ROOT / "config/embodiments/sim_arm.yaml").read_text()


def make_batch(size: Size, count: int = 1) -> dict[str, Any]:
    """Observations of two steps, random pictures."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, 2, 3, size.image, size.image)
    batch: dict[str, Any] = {
        key: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for key in CAMERAS
    }
    batch["observation.state"] = torch.rand(count, 2, JOINTS, generator=generator) * 2 - 1
    return batch | {"task": [TASK] * count}


def their_batch(pair: Pair, batch: dict[str, Any]) -> dict[str, Any]:
    """The same as LeRobot's policy wants it: normalised and tokenised already, which is not timed."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (CLIP_MEAN, CLIP_STD))
    pictures = [(batch[key].float() / 255 - mean) / std for key in CAMERAS]
    text = pair.ours.observation_encoder.text_encoder
    assert text is not None
    tokens = text.tokenizer(batch["task"], return_tensors="pt", padding="max_length", max_length=77, truncation=True)
    given = {
        "observation.state": batch["observation.state"],
        "observation.images": torch.stack(pictures, dim=2),
        "observation.language.tokens": tokens["input_ids"],
        "observation.language.attention_mask": tokens["attention_mask"],
    }
    return {key: value.to(pair.device) for key, value in given.items()}


def waiter(device: torch.device) -> Callable[[], None]:
    """What returns when the device is done."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


# --- the figures ---


def step_rows(
    pair: Pair, engines: dict[str, PolicyEngine], size: Size, where: str, compile_mode: str | None
) -> list[Row]:
    """A denoising step at batch 1: eager, compiled and ours in each precision, the bare products beside."""
    device = pair.device
    x = torch.randn(1, pair.ours.config.horizon, JOINTS, device=device)
    timestep = torch.tensor([50], device=device)
    with torch.inference_mode():
        conditioning = pair.ours.encode(make_batch(size))
        network = pair.theirs.noise_predictor
        torch._dynamo.reset()
        compiled = torch.compile(network, mode=compile_mode)
        subjects: dict[str, Callable[[], Any]] = {
            "eager": lambda: network(x, timestep, conditioning_vec=conditioning),
            "compile": lambda: compiled(x, timestep, conditioning_vec=conditioning),
        }
        for precision, engine in engines.items():
            plan = make_plan(engine.policy.objective, "ddim", STEPS, device)  # timestep 50 is its fifth
            predict = engine.fast.network(plan, conditioning, None, 1.0)
            subjects[precision] = partial(predict, x, 4)
            subjects[f"products {precision}"] = partial(bare_products, engine, x.shape[1])
        expected = subjects["eager"]()
        errors = {precision: float((subjects[precision]() - expected).abs().max()) for precision in engines}
        seconds = interleave(subjects, size.step_repeats, waiter(device), warm_up=3)
    rows = []
    for precision in engines:
        bars = {"fp32": (1.9, 1.6), "bf16": (4.0, None)}[precision] if device.type == "cpu" else (None, None)
        for other, bar in zip(("eager", "compile"), bars, strict=True):
            how = f"one network call, batch 1, horizon 32, conditioning and timestep tables made; LeRobot {other}"
            how += f"; largest difference {errors[precision]:.1e} of outputs up to {float(expected.abs().max()):.1f}"
            name = f"denoising step, {precision}, against {other}, {where}"
            rows.append(ratio_row(name, seconds[other], seconds[precision], bar, how))
        share = 100 * statistics.median(
            a / b for a, b in zip(seconds[f"products {precision}"], seconds[precision], strict=True)
        )
        how = "time of the blocks' matrix products alone, as a share of the step's"
        rows.append(figure_row(f"bare products in a step, {precision}, {where}", share, "%", how))
    return rows


def bare_products(engine: PolicyEngine, steps: int) -> None:
    """The matrix products of a denoising step and nothing else."""
    transformer = engine.fast.paths.transformer
    assert transformer is not None
    hidden = torch.zeros(1, steps, transformer.network.input_proj.out_features, dtype=transformer.dtype)
    hidden = hidden.to(engine.policy.device)
    for block in transformer.blocks:
        block.qkv(hidden)
        block.out(hidden)
        block.down(block.up(hidden))


def chunk_rows(pair: Pair, engines: dict[str, PolicyEngine], size: Size, where: str) -> list[Row]:
    """A whole chunk, DDIM in 10 steps: from a new frame of each camera to actions."""
    batch = make_batch(size)
    given = their_batch(pair, batch)
    policy, device = pair.ours, pair.device
    noise = torch.randn(1, policy.config.horizon, JOINTS, device=device)
    subjects: dict[str, Callable[[], Any]] = {"eager": lambda: their_chunk(pair, given)}
    rows = []
    with torch.inference_mode():
        expected = their_normalised(pair, given, noise)
        for precision, engine in engines.items():
            previous = {key: engine.encode_frame(key, batch[key][:, 0]) for key in CAMERAS}
            subjects[precision] = partial(steady_chunk, engine, batch, previous)
            subjects[f"{precision}, nothing cached"] = partial(engine.predict_chunk, batch)
        errors = {
            precision: float((engine.predict_chunk(batch, noise=noise) - expected).abs().max())
            for precision, engine in engines.items()
        }
        seconds = interleave(subjects, size.chunk_repeats, waiter(device), warm_up=1)
    for name, bar in (("fp32", 2.2), ("bf16", 5.0), ("fp32, nothing cached", None), ("bf16, nothing cached", None)):
        cached = "previous frames' and text's features cached" if "nothing" not in name else "all frames encoded"
        how = f"2 cameras at {size.image}, n_obs_steps 2, DDIM {STEPS}, {cached}, pictures uint8; LeRobot eager, its "
        how += f"pictures normalised before; largest difference {errors[name[:4]]:.1e} of actions in [-1, 1]"
        bar = bar if device.type == "cpu" else None
        rows.append(ratio_row(f"chunk, {name}, {where}", seconds["eager"], seconds[name], bar, how))
    how = "the same weights and noise; actions in [-1, 1]"
    for precision, error in errors.items():
        at_most = EXACT if precision == "fp32" else None
        rows.append(figure_row(f"largest difference of a chunk, {precision}, {where}", error, "", how, at_most))
    return rows


def steady_chunk(engine: PolicyEngine, batch: dict[str, Any], previous: dict[str, Tensor]) -> Tensor:
    """A new frame of each camera arrives; actions come out."""
    frames = {key: [previous[key], engine.encode_frame(key, batch[key][:, 1])] for key in CAMERAS}
    return engine.predict_chunk_from(batch["observation.state"], frames, batch["task"])


def their_chunk(pair: Pair, given: dict[str, Any]) -> Tensor:
    """LeRobot's, the whole horizon."""
    conditioning = pair.theirs.observation_encoder.encode(given)
    return pair.theirs.objective.conditional_sample(pair.theirs.noise_predictor, 1, conditioning)


def their_normalised(pair: Pair, given: dict[str, Any], noise: Tensor) -> Tensor:
    """Its actions from now on, from a noise of ours (which it would draw itself)."""
    return their_loop(pair, pair.theirs.observation_encoder.encode(given), noise)[:, 1:]


def their_loop(pair: Pair, conditioning: Tensor, noise: Tensor) -> Tensor:
    """Its denoising loop from a noise of ours, the whole horizon."""
    objective, sample = pair.theirs.objective, noise.clone()
    objective.noise_scheduler.set_timesteps(STEPS)
    for timestep in objective.noise_scheduler.timesteps:
        out = pair.theirs.noise_predictor(
            sample, timestep.expand(len(sample)).to(sample.device), conditioning_vec=conditioning
        )
        sample = objective.noise_scheduler.step(out, timestep, sample).prev_sample
    return sample


def batch_rows(pair: Pair, engine: PolicyEngine, size: Size, where: str) -> list[Row]:
    """The denoising loop, its conditioning included, for more observations at once."""
    rows = []
    for count in size.batches:
        with torch.inference_mode():
            conditioning = torch.randn(count, pair.ours.observation_encoder.conditioning_dim, device=pair.device)
            noise = torch.randn(count, pair.ours.config.horizon, JOINTS, device=pair.device)
            subjects: dict[str, Callable[[], Any]] = {
                "eager": partial(
                    pair.theirs.objective.conditional_sample, pair.theirs.noise_predictor, count, conditioning
                ),
                "ours": partial(engine.fast.sample, conditioning, noise=noise),
            }
            expected = their_loop(pair, conditioning, noise)
            error = float((engine.fast.sample(conditioning, noise=noise) - expected).abs().max())
            repeats = max(3, size.step_repeats // (4 * count))
            seconds = interleave(subjects, repeats, waiter(pair.device), warm_up=1)
        how = f"DDIM {STEPS} from a conditioning to actions, fp32, LeRobot eager; largest difference {error:.1e}"
        rows.append(ratio_row(f"sampling, batch {count}, {where}", seconds["eager"], seconds["ours"], None, how))
    return rows


# --- loading ---


def load(kind: str, folder: Path) -> dict[str, float]:
    """Loads in this process, which has only imported: seconds, and bytes that the peak grew by."""
    from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy

    loaders: dict[str, Callable[[], Any]] = {
        "mapped": partial(load_checkpoint, folder),
        "read": partial(load_checkpoint, folder, mapped=False),
        "engine": lambda: PolicyEngine(load_checkpoint(folder, mapped=False)).policy,
        "lerobot": partial(MultiTaskDiTPolicy.from_pretrained, folder),
    }
    run = loaders[kind]
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.perf_counter()
    policy = run()
    seconds = time.perf_counter() - started
    touched = sum(float(parameter.detach().flatten()[-1]) for parameter in policy.parameters())
    assert touched == touched  # every tensor is there, and a number
    return {"seconds": seconds, "peak": memory("VmHWM") - before}


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def load_rows(pair: Pair, repeats: int) -> list[Row]:
    """Loading a checkpoint, each time in a process of its own, files in the page cache."""
    weights = (pair.native / "model.safetensors").stat().st_size
    kinds = {
        "mapped": "weights mapped from the file, load_checkpoint's default",
        "read": "weights read, as the node does",
        "engine": "weights read, and laid out by the engine",
    }
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in (*kinds, "lerobot")}
    for _ in range(repeats + 1):
        for kind in found:
            command = [sys.executable, __file__, "--load", kind, str(pair.native if kind in kinds else pair.lerobot)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[kind].append(json.loads(output.splitlines()[-1]))
    seconds = {kind: [each["seconds"] for each in runs[1:]] for kind, runs in found.items()}
    peak = {kind: statistics.median(each["peak"] for each in runs[1:]) / weights for kind, runs in found.items()}
    how = f"a folder of {weights / 1e6:.0f} MB of weights, imports done, one process each, files in the page cache"
    rows = []
    for kind, what in kinds.items():
        barred = kind == "mapped"
        bar = 3.0 if barred else None
        speed = f"{how}; LeRobot from_pretrained"
        rows.append(ratio_row(f"loading, {what}", seconds["lerobot"], seconds[kind], bar, speed))
        memory = f"{how}; growth of VmHWM; LeRobot {peak['lerobot']:.2f} times"
        at_most = 1.3 if barred else None
        rows.append(figure_row(f"peak memory, {what}", peak[kind], "times the weights", memory, at_most))
    return rows


# --- growth ---


def growth(pair: Pair, engines: dict[str, PolicyEngine], size: Size) -> dict[str, dict[str, list[float]]]:
    """{what varies: {subject: milliseconds of a steady chunk at each value}}, one thread, all else as by default."""
    with torch.inference_mode():
        frame = frame_seconds(pair, engines, size)
        found: dict[str, dict[str, list[float]]] = {}
        for name, values in size.growth.items():
            found[name] = {subject: [] for subject in frame}
            for value in values:
                sampled = sampling_seconds(pair, size, **{name: value})
                cameras = value if name == "cameras" else len(CAMERAS)
                for subject, seconds in sampled.items():
                    # LeRobot encodes n_obs_steps frames of each camera, the engine the new one.
                    found[name][subject].append(1e3 * (seconds + cameras * frame[subject]))
                gc.collect()
    return found


def frame_seconds(pair: Pair, engines: dict[str, PolicyEngine], size: Size) -> dict[str, float]:
    """Vision for one camera at a chunk: LeRobot two frames, the engine one."""
    batch = make_batch(size)
    pictures = their_batch(pair, batch)["observation.images"][0, :, 0]
    subjects: dict[str, Callable[[], Any]] = {
        "LeRobot": partial(pair.theirs.observation_encoder.vision_encoder, pictures)
    }
    for precision, engine in engines.items():
        subjects[precision] = partial(engine.encode_frame, CAMERAS[0], batch[CAMERAS[0]][:, 1])
    seconds = interleave(subjects, 5, waiter(pair.device), warm_up=1)
    return {name: statistics.median(each) for name, each in seconds.items()}


def sampling_seconds(
    pair: Pair, size: Size, horizon: int = 32, layers: int | None = None, cameras: int = 2, steps: int = STEPS
) -> dict[str, float]:
    """DDIM from a conditioning to actions, with transformers of that shape."""
    from lerobot.policies.multi_task_dit.modeling_multi_task_dit import DiffusionTransformer as Theirs

    shape = replace(size.transformer, num_layers=layers or size.transformer.num_layers)
    encoder = pair.ours.observation_encoder
    dim = encoder.conditioning_dim + 2 * (cameras - len(CAMERAS)) * encoder.image_dim
    ours = DiffusionTransformer(shape, JOINTS, horizon, dim).eval()
    their_shape = replace(pair.theirs.config, horizon=horizon, n_action_steps=1, num_layers=shape.num_layers)
    theirs = Theirs(their_shape, dim).eval()
    plan = make_plan(Diffusion(DiffusionConfig(timestep_spacing="leading")), "ddim", steps, "cpu")
    x, conditioning = torch.randn(1, horizon, JOINTS), torch.randn(1, dim)

    def run_theirs() -> Tensor:
        return plan.run(lambda x, call: theirs(x, plan.timesteps[call][None], conditioning_vec=conditioning), x)

    def run_fast(fast: FastTransformer, table: Tensor) -> Tensor:
        part = fast.conditioning_part(conditioning)[:, :, None]
        return plan.run(lambda x, call: fast(x, part + table[:, call, None, None]), x)

    subjects: dict[str, Callable[[], Any]] = {"LeRobot": run_theirs}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        fast = FastTransformer(ours, shape.num_heads, dtype)
        subjects[precision] = partial(run_fast, fast, fast.table(plan.timesteps))
    seconds = interleave(subjects, 3, warm_up=1)
    return {name: statistics.median(each) for name, each in seconds.items()}


def plot(found: dict[str, dict[str, list[float]]], values: dict[str, tuple[int, ...]], target: Path) -> None:
    """Four panels: time of a chunk in steady operation over what varies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"horizon": "horizon", "layers": "layers", "cameras": "cameras", "steps": "denoising steps"}
    colours = {"LeRobot": "#8c8c8c", "fp32": "#1f6fb4", "bf16": "#d9651b"}
    figure, axes = pyplot.subplots(1, len(found), figsize=(12, 3.2), sharey=True, constrained_layout=True)
    for axis, (name, curves) in zip(axes, found.items(), strict=True):
        for subject, milliseconds in curves.items():
            label = "LeRobot, eager" if subject == "LeRobot" else f"engine, {subject}"
            axis.plot(values[name], milliseconds, marker="o", color=colours[subject], label=label)
        axis.set_xlabel(labels[name])
        axis.set_xticks(values[name])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(bottom=0)  # after all curves: the panels share the axis, and this ends its scaling
    axes[0].set_ylabel("a chunk in steady operation, ms")
    axes[0].legend(frameon=False, fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def measure(size: Size, picture: Path) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and what the plot at `picture` shows: {what varies: {subject: {value: milliseconds}}}."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        pair = make_pair(size, Path(folder))
        rows += load_rows(pair, repeats=3)
        engines = {precision: PolicyEngine(pair.ours, precision) for precision in ("fp32", "bf16")}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            where = f"{threads} thread{'s' if threads > 1 else ''}"
            rows += step_rows(pair, engines, size, where, compile_mode=None)
            rows += chunk_rows(pair, engines, size, where)
            rows += batch_rows(pair, engines["fp32"], size, where)
        torch.set_num_threads(1)
        found = growth(pair, engines, size)
        plot(found, size.growth, picture)
        for precision, engine in engines.items():
            how = "copies of the weights beside the policy's own"
            rows.append(figure_row(f"memory of the engine, {precision}", engine.bytes / 1e6, "MB", how))
    shown = {
        name: {subject: dict(zip(size.growth[name], times, strict=True)) for subject, times in curves.items()}
        for name, curves in found.items()
    }
    return rows, shown


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 0 if every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny size, to try the script")
    parser.add_argument("--load", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.load:
        print(json.dumps(load(options.load[0], Path(options.load[1]))))
        return 0
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            rows, shown = measure(QUICK, Path(folder) / "speed.png")
            return publish("policy-quick", rows, growth_ms=shown)
    rows, shown = measure(FULL, ROOT / "docs/images/policy_speed.png")
    return publish("policy", rows, growth_ms=shown)


if __name__ == "__main__":
    sys.exit(main())
