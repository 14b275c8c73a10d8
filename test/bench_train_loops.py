"""A trainer as it is started, held between blocks of steps: what test/bench_train.py runs as a process of its own.

    python test/bench_train_loops.py {ours,lerobot} TOKENS REPORTS ARGUMENTS...

TOKENS and REPORTS are file descriptors. After its first step the loop reports and waits; each line of TOKENS is a
number of steps to do, after which it reports again. It is the real command: of it a function that is called each step
is wrapped, and what gives the batches.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

import torch


@dataclass
class Block:
    """What a loop says of a block of steps. Seconds; bytes on the GPU, 0 without one."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # for batches
    gpu_bytes: int = 0
    parameters: int = 0  # that are trained
    decoding: float = 0.0  # before the first step


class Gate:
    """Holds a loop between blocks."""

    def __init__(self, tokens: IO[str], reports: IO[str]):
        self._tokens, self._reports = tokens, reports
        self._block = Block()
        self._wanted = 1
        self._started = time.perf_counter()
        self._gpu_bytes = 0

    def decoded(self, seconds: float) -> None:
        """Pictures were decoded before the first step."""
        self._block.decoding += seconds

    def waited(self, seconds: float) -> None:
        """For a batch."""
        self._block.waited += seconds

    def step(self, parameters: Callable[[], int]) -> None:
        """A step was done; at a block's end this returns when the next may begin. Raises SystemExit at the end."""
        block = self._block
        block.steps += 1
        if torch.cuda.is_available():  # lerobot-train sets the peak back before every step
            self._gpu_bytes = max(self._gpu_bytes, torch.cuda.max_memory_allocated())
        if block.steps < self._wanted:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        block.seconds = time.perf_counter() - self._started
        block.gpu_bytes, block.parameters = self._gpu_bytes, parameters()
        self._reports.write(json.dumps(asdict(block)) + "\n")
        self._reports.flush()
        token = self._tokens.readline()
        if not token.strip():
            raise SystemExit(0)
        self._block, self._wanted = Block(), int(token)
        self._started = time.perf_counter()


def trainable(policy: torch.nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)


def run_ours(gate: Gate) -> None:
    """`python -m dit_policy_training.train` with the command line's arguments."""
    from dit_policy_training import train
    from dit_policy_training.loop.trainer import Trainer

    step, open_frames = Trainer._train_step, Trainer._open_frames

    def gated_step(self: Trainer, ready: Any) -> Any:
        before = ready.waited
        figures = step(self, ready)
        gate.waited(ready.waited - before)
        gate.step(lambda: trainable(self.policy))
        return figures

    def timed_open(self: Trainer, progress: Any) -> Any:
        started = time.perf_counter()
        frames = open_frames(self, progress)
        gate.decoded(time.perf_counter() - started)
        return frames

    Trainer._train_step, Trainer._open_frames = gated_step, timed_open  # type: ignore[method-assign]
    raise SystemExit(train.main())


def run_lerobot(gate: Gate) -> None:
    """`lerobot-train` with the command line's arguments."""
    from lerobot.scripts import lerobot_train

    update, cycle = lerobot_train.update_policy, lerobot_train.cycle

    def gated_update(metrics: Any, policy: Any, *arguments: Any, **keywords: Any) -> Any:
        found = update(metrics, policy, *arguments, **keywords)
        gate.step(lambda: trainable(policy))
        return found

    def timed_cycle(batches: Any) -> Iterator[Any]:
        endless = cycle(batches)
        while True:
            started = time.perf_counter()
            batch = next(endless)
            gate.waited(time.perf_counter() - started)
            yield batch

    lerobot_train.update_policy, lerobot_train.cycle = gated_update, timed_cycle
    lerobot_train.main()


LOOPS: dict[str, Callable[[Gate], None]] = {"ours": run_ours, "lerobot": run_lerobot}


def main() -> None:
    """Runs a loop; ends where the tokens do."""
    kind, tokens, reports = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.argv = [kind, *sys.argv[4:]]
    with os.fdopen(tokens) as incoming, os.fdopen(reports, "w") as outgoing:
        LOOPS[kind](Gate(incoming, outgoing))


if __name__ == "__main__":
    main()
