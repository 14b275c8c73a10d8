"""`make bench-gpu`: the engine against LeRobot's `multi_task_dit` on CUDA, same process, weights and noise.

fp32 and bf16, with CUDA graphs and without, against LeRobot eager and under torch.compile(mode="reduce-overhead").
Writes outputs/bench/gpu.json, with the date and the GPU; exits 1 if a bar does not hold, 2 where there is no CUDA.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_policy import (
    CAMERAS,
    FULL,
    JOINTS,
    QUICK,
    STEPS,
    Pair,
    Size,
    make_batch,
    make_pair,
    steady_chunk,
    their_batch,
    their_chunk,
    their_normalised,
    waiter,
)
from bench_report import Row, figure_row, interleave, publish, ratio_row
from torch import Tensor, nn

from dit_policy_ros.policy.engine import PolicyEngine

MAX_CHUNK_MS = 5.0  # on an H200
EAGER_BAR, COMPILED_BAR = 10.0, 3.0


class Compiled(nn.Module):
    """LeRobot's transformer under torch.compile(mode="reduce-overhead"), each call a step of its CUDA graphs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self._compiled = torch.compile(network, mode="reduce-overhead")

    def forward(self, *arguments: Tensor, **keywords: Tensor) -> Tensor:
        """As the network's; a copy, since the next call writes over the graph's own."""
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(*arguments, **keywords).clone()


def make_engines(pair: Pair) -> dict[str, PolicyEngine]:
    """Each precision with CUDA graphs and without."""
    return {
        f"{precision}, {'graphs' if graphs else 'no graphs'}": PolicyEngine(pair.ours, precision, cuda_graphs=graphs)
        for precision in ("fp32", "bf16")
        for graphs in (True, False)
    }


def loop_rows(pair: Pair, engines: dict[str, PolicyEngine], size: Size, compiled: nn.Module | None) -> list[Row]:
    """The denoising loop at batch 1, from a conditioning to actions."""
    sample = partial(pair.theirs.objective.conditional_sample, batch_size=1)
    with torch.inference_mode():
        conditioning = pair.ours.encode(make_batch(size))
        noise = torch.randn(1, pair.ours.config.horizon, JOINTS, device=pair.device)
        subjects: dict[str, Callable[[], Any]] = {
            "eager": partial(sample, pair.theirs.noise_predictor, conditioning_vec=conditioning)
        }
        if compiled is not None:
            subjects["compile"] = partial(sample, compiled, conditioning_vec=conditioning)
        for name, engine in engines.items():
            subjects[name] = partial(engine.fast.sample, conditioning, noise=noise)
        seconds = interleave(subjects, size.step_repeats, waiter(pair.device), warm_up=4)
    rows = []
    for name in engines:
        with_graphs = "no graphs" not in name
        for other, bar in (("eager", EAGER_BAR), ("compile", COMPILED_BAR)):
            if other in seconds:
                how = f"DDIM {STEPS}, batch 1, horizon 32, conditioning's part included; LeRobot {other}"
                how += ", mode reduce-overhead" if other == "compile" else ""
                bar = bar if with_graphs else None
                rows.append(ratio_row(f"loop, {name}, against {other}", seconds[other], seconds[name], bar, how))
    return rows


def chunk_rows(pair: Pair, engines: dict[str, PolicyEngine], size: Size) -> list[Row]:
    """A whole chunk in steady operation: a new frame of each camera to actions on the host."""
    batch = make_batch(size)
    given = their_batch(pair, batch)
    noise = torch.randn(1, pair.ours.config.horizon, JOINTS, device=pair.device)
    subjects: dict[str, Callable[[], Any]] = {"eager": lambda: their_chunk(pair, given).cpu()}
    errors = {}
    with torch.inference_mode():
        # cuDNN's convolution rounds to TF32 by default; as an oracle it must not.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected = their_normalised(pair, given, noise)
        for name, engine in engines.items():
            previous = {key: engine.encode_frame(key, batch[key][:, 0]) for key in CAMERAS}
            subjects[name] = partial(_chunk_on_host, engine, batch, previous)
            errors[name] = float((engine.predict_chunk(batch, noise=noise) - expected).abs().max())
        seconds = interleave(subjects, size.chunk_repeats, waiter(pair.device), warm_up=4)
    rows = []
    for name in engines:
        how = f"2 cameras at {size.image}, n_obs_steps 2, DDIM {STEPS}, the previous frames' and the text's features "
        how += f"cached, pictures uint8 from the host, actions on the host; largest difference {errors[name]:.1e} of "
        how += "actions in [-1, 1]"
        bar = MAX_CHUNK_MS if "no graphs" not in name else None
        milliseconds = 1e3 * statistics.median(seconds[name])
        rows.append(figure_row(f"chunk, {name}", milliseconds, "ms", how, at_most=bar))
        rows.append(ratio_row(f"chunk, {name}, against eager", seconds["eager"], seconds[name], None, how))
    return rows


def _chunk_on_host(engine: PolicyEngine, batch: dict[str, Any], previous: dict[str, Tensor]) -> Tensor:
    return steady_chunk(engine, batch, previous).cpu()


def measure(size: Size, device: str, compiles: bool) -> list[Row]:
    """All rows on a device; `compiles` says whether LeRobot under torch.compile is among them."""
    with tempfile.TemporaryDirectory() as folder:
        pair = make_pair(size, Path(folder), device)
    engines = make_engines(pair)
    rows = []
    for name, engine in engines.items():
        for report in engine.verify(make_batch(size)):
            if report.share is not None:
                label = f"verification, {name}, {report.name}"
                rows.append(
                    figure_row(label, report.share, "of an action's range", str(report), at_most=report.tolerance)
                )
    compiled = Compiled(pair.theirs.noise_predictor) if compiles else None
    return rows + loop_rows(pair, engines, size, compiled) + chunk_rows(pair, engines, size)


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; 0 if every bar holds, 1 if not, 2 without CUDA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny size, to try the script; its figures mean nothing")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench-gpu needs a CUDA device and a torch built for it; here torch sees none, so nothing was measured.")
        return 2
    rows = measure(QUICK if options.quick else FULL, "cuda", compiles=True)
    part = "gpu-quick" if options.quick else "gpu"
    return publish(part, rows, device=torch.cuda.get_device_name(), date=date.today().isoformat())


if __name__ == "__main__":
    sys.exit(main())
