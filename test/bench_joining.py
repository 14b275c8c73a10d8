"""`make bench-joining`: how well a new chunk goes on from the one in motion, by each way of real-time chunking.

A chunk is sampled, and DELAY steps later, at the next observation, another one while DELAY more steps of the first are
executed. `held`: how far the new chunk's committed steps are from those executed. `seam`: the step from the last
committed action to the new chunk's next, against the recorded one. `rest`: the steps after it against the recorded
actions. Root mean squares. The cost is CPU time on one thread, sampling one chunk, without encoding the observation.

Policies of the demo's recipe: the demo's own, one by diffusion, one trained with committed steps (each trained once, in
ten minutes, on the dataset that `make demo-train` leaves). Writes outputs/bench/joining.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any, get_args

import torch
from bench_recipe import DATASET, FLOW, diffusion_checkpoint, milliradians, observations, prefix_checkpoint
from bench_report import Row, figure_row, publish
from torch import Tensor

from dit_policy_ros.policy.checkpoint import load_checkpoint
from dit_policy_ros.policy.configuration import ACTION
from dit_policy_ros.policy.modeling import MultitaskDiTPolicy
from dit_policy_ros.policy.realtime import ChunkInMotion
from dit_policy_ros.policy.sampling import Joining, Sampling

OBSERVATIONS, DELAY, EXECUTION_HORIZON, TIMED_RUNS = 64, 4, 8, 15
EXACT = 0.01
"""mrad; what a prefix may be off, by rounding."""


def rows(name: str, policy: MultitaskDiTPolicy, sampling: Sampling, batches: list[dict[str, Any]]) -> Iterator[Row]:
    """A policy's figures without joining and with each way that it knows."""
    before, now = batches
    old = policy.predict_chunk(before, sampling, generator=torch.Generator().manual_seed(0))[:, DELAY:]
    recorded = now[ACTION][:, policy.config.n_obs_steps - 1 :]
    for joining in (None, *get_args(Joining)):
        if joining == "prefix" and policy.config.max_delay < DELAY:
            continue
        chosen = Sampling(sampling.sampler, sampling.denoising_steps, joining=joining)
        motion = None if joining is None else ChunkInMotion(old, DELAY, EXECUTION_HORIZON)
        new = policy.predict_chunk(now, chosen, generator=torch.Generator().manual_seed(1), motion=motion)
        how = f"{OBSERVATIONS} observations, delay {DELAY}, execution horizon {EXECUTION_HORIZON}"
        row = f"{name}, {joining or 'not joined'}"
        held = milliradians(new[:, :DELAY] - old[:, :DELAY])
        yield figure_row(f"{row}: held", held, "mrad", how, at_most=EXACT if joining == "prefix" else None)
        step = new[:, DELAY] - old[:, DELAY - 1]
        seam = milliradians(step - (recorded[:, DELAY] - recorded[:, DELAY - 1]))
        yield figure_row(f"{row}: seam", seam, "mrad", how)
        yield figure_row(f"{row}: rest", milliradians(new[:, DELAY:] - recorded[:, DELAY:]), "mrad", how)
        yield figure_row(f"{row}: time", milliseconds(policy, now, chosen, old[:1]), "ms CPU", "one chunk, one thread")


def milliseconds(policy: MultitaskDiTPolicy, batch: dict[str, Any], sampling: Sampling, old: Tensor) -> float:
    """CPU time of sampling one chunk of an encoded observation."""
    one = {key: value[:1] for key, value in batch.items()}
    motion = None if sampling.joining is None else ChunkInMotion(old, DELAY, EXECUTION_HORIZON)
    seconds = []
    with torch.inference_mode():
        conditioning, origin = policy.encode(one), policy.action_origin(one)
        for _ in range(TIMED_RUNS):
            started = time.process_time()
            policy.candidates_from(conditioning, origin, sampling, motion=motion)
            seconds.append(time.process_time() - started)
    return 1e3 * median(seconds)


def main() -> int:
    """All policies; 0 if the bars hold, 1 if one does not, 2 if the dataset is missing."""
    if not DATASET.exists():
        print(f"{DATASET} is not there: run `make demo-train` first (20 minutes)", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    demo = load_checkpoint(FLOW)
    batches = observations(demo.config, OBSERVATIONS, ago=DELAY)
    studies = (
        ("flow, euler 5", demo, Sampling("euler", 5)),
        ("flow, euler 10", demo, Sampling("euler", 10)),
        ("diffusion, ddim 10", load_checkpoint(diffusion_checkpoint()), Sampling("ddim", 10)),
        ("flow with max_delay 6, euler 5", load_checkpoint(prefix_checkpoint()), Sampling("euler", 5)),
    )
    return publish("joining", [row for name, policy, how in studies for row in rows(name, policy, how, batches)])


if __name__ == "__main__":
    sys.exit(main())
