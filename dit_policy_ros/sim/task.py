"""The task: push the block of the named colour over the line, and leave the others where they are."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dit_policy_ros.sim.scene import COLOURS, LINE_X

START_X, START_Y = (0.40, 0.52), (-0.22, 0.22)  # m, where blocks' middles may stand at the start
LANE = 0.115  # m, least distance across y, so that one block's way to the line is free of the others
MAX_MOVED = 0.04  # m, how far another block may be nudged
TIME_LIMIT = 12.0  # s, for one episode
SETTLED_S = 0.3  # how long a success must last to count
FIRST_SEED = 500_000  # of the scenes that policies are judged in; training's count up from 1000
CONTROLS = ("none", "blank_images", "wrong_instruction")  # what a policy is deprived of, to see what it goes by


@dataclass(frozen=True)
class TaskResult:
    """What became of the blocks.

    success: the target is over the line and no other block is disturbed.
    wrong_block: another block moved MAX_MOVED or more, or lies over the line.
    moved: metres from where each block started, by colour.
    """

    success: bool
    target_over: bool
    wrong_block: bool
    moved: dict[str, float]


def instruction_for(colour: str) -> str:
    """The sentence that asks for the block of that colour."""
    if colour not in COLOURS:
        raise ValueError(f"no block is {colour!r}; there are: {', '.join(COLOURS)}")
    return f"push the {colour} block over the line"


def target_of(number: int, control: str = "none") -> str:
    """The colour asked for in the number-th scene, 0 the first; "wrong_instruction" asks for another than usual."""
    return COLOURS[(number + (control == "wrong_instruction")) % len(COLOURS)]


def place_blocks(rng: np.random.Generator) -> dict[str, tuple[float, float, float]]:
    """Random x, y (m) and yaw (rad, within a cube's symmetry of +-45 degrees) of each block, no two in one lane."""
    while True:
        y = rng.uniform(*START_Y, size=len(COLOURS))
        if np.diff(np.sort(y)).min() >= LANE:
            break
    x = rng.uniform(*START_X, size=len(COLOURS))
    yaw = rng.uniform(-np.pi / 4, np.pi / 4, size=len(COLOURS))
    return {c: (float(x[i]), float(y[i]), float(yaw[i])) for i, c in enumerate(COLOURS)}


def is_over_line(x: float) -> bool:
    """Whether a block whose middle is at x (m) is over the line."""
    return x > LINE_X


def judge(
    target: str, start_xy: Mapping[str, tuple[float, ...]], now_xy: Mapping[str, tuple[float, ...]]
) -> TaskResult:
    """Compare the blocks' places at the start and now; of each place only x and y count."""
    if missing := {target, *start_xy} - now_xy.keys() | ({target} - start_xy.keys()):
        raise ValueError(f"no place given for: {', '.join(sorted(missing))}")
    moved = {c: float(np.hypot(now_xy[c][0] - x, now_xy[c][1] - y)) for c, (x, y, *_) in start_xy.items()}
    wrong = any(moved[c] >= MAX_MOVED or is_over_line(now_xy[c][0]) for c in start_xy if c != target)
    over = is_over_line(now_xy[target][0])
    return TaskResult(success=over and not wrong, target_over=over, wrong_block=wrong, moved=moved)
