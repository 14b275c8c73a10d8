"""The real policy node, with a policy that moves the arm to and fro, and that fails when a file says how.

Only for test/faults.py. The engine computes as ever; what it predicts is replaced by a smooth motion, since an
untrained policy's would hardly move the arm. The file named by FAULTS_FILE holds one word, or nothing: `throws`,
`hangs` (until the file is emptied), `nan`, `beyond` (the limits), `slow` (5 s). Each time it strikes, the moment (s,
CLOCK_MONOTONIC, which all processes share) is appended to FAULTS_FILE.hits.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from dit_policy_ros.nodes.policy_node import main
from dit_policy_ros.policy.engine import PolicyEngine

SPEED = (0.5, 0.2, 0.0, 0.3, 0.0, 0.0, 0.0)  # rad/s of each joint, at full speed
TURN = 0.5  # rad from home of the first joint, where the motion turns back
RAMP = 0.3  # s from rest to full speed
STEP = 0.1  # s, 1/fps of config/embodiments/sim_arm.yaml
SLOW = 5.0  # s


class ToAndFro:
    """A motion of all joints together, which goes on from whatever the arm does."""

    def __init__(self) -> None:
        self._direction = 1.0

    def rows(self, state: torch.Tensor, steps: int) -> torch.Tensor:
        """(steps, 7) positions in rad, from the two newest states (n_obs, 7)."""
        now, before = state[-1].double(), state[-2].double()
        if abs(float(now[0])) > TURN:
            self._direction = -1.0 if now[0] > 0 else 1.0
        pace = float((now[0] - before[0]) / STEP / SPEED[0])
        pace = max(-1.0, min(1.0, pace))
        rows, covered = [], 0.0
        for _ in range(steps):
            change = max(-STEP / RAMP, min(STEP / RAMP, self._direction - pace))
            covered += (pace + change / 2) * STEP
            pace += change
            rows.append(now + covered * torch.tensor(SPEED, dtype=torch.float64))
        return torch.stack(rows)


def strike(fault: str, file: Path, actions: torch.Tensor) -> torch.Tensor:
    """What the engine gives back, or does, under a fault."""
    with Path(f"{file}.hits").open("a") as hits:
        hits.write(f"{time.monotonic()}\n")
    if fault == "throws":
        raise RuntimeError("the device fell off the bus")
    if fault == "hangs":
        while file.read_text():
            time.sleep(0.01)
    elif fault == "slow":
        time.sleep(SLOW)
    elif fault == "nan":
        actions[0, 3, 2] = float("nan")
    elif fault == "beyond":
        actions = actions + 10.0
    return actions


def spoil(file: Path) -> None:
    """Replace the engine's prediction for the rest of this process."""
    predict, motion = PolicyEngine.predict_chunk_from, ToAndFro()

    def predict_or_fail(engine: PolicyEngine, state: Any, *args: Any, **options: Any) -> torch.Tensor:
        predicted = predict(engine, state, *args, **options)
        actions = motion.rows(state[0], predicted.shape[1])[None]
        fault = file.read_text()
        return strike(fault, file, actions) if fault else actions

    PolicyEngine.predict_chunk_from = predict_or_fail  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    spoil(Path(os.environ["FAULTS_FILE"]))
    main()
