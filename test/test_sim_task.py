import numpy as np
import pytest

from dit_policy_ros.sim import task

START = {"red": (0.40, -0.15), "green": (0.45, 0.0), "blue": (0.40, 0.15)}


def judged(target: str, **moved: tuple[float, float]) -> task.TaskResult:
    return task.judge(target, START, {**START, **moved})


def test_only_the_target_over_the_line_is_success():
    result = judged("green", green=(0.63, 0.0))
    assert result.success
    assert result.target_over
    assert not result.wrong_block
    assert result.moved["green"] == pytest.approx(0.18)
    assert result.moved["red"] == 0.0


def test_nothing_moved_is_neither_success_nor_wrong():
    assert judged("red") == task.TaskResult(False, False, False, {"red": 0.0, "green": 0.0, "blue": 0.0})


def test_a_nudge_under_four_centimetres_is_forgiven_and_more_is_not():
    over = (0.63, 0.0)
    assert judged("green", green=over, red=(0.40, -0.15 + 0.039)).success
    disturbed = judged("green", green=over, red=(0.40, -0.15 + 0.041))
    assert not disturbed.success
    assert disturbed.wrong_block
    assert disturbed.target_over


def test_another_block_over_the_line_is_wrong_however_little_it_moved():
    start = {**START, "blue": (0.61, 0.15)}
    result = task.judge("red", start, {**start, "blue": (0.63, 0.15)})
    assert result.wrong_block
    assert not result.success


def test_a_target_unknown_or_unseen_is_an_error():
    with pytest.raises(ValueError, match="no place given for: yellow"):
        task.judge("yellow", START, START)
    with pytest.raises(ValueError, match="no place given for: blue"):
        task.judge("red", START, {c: START[c] for c in ("red", "green")})


def test_instructions():
    assert task.instruction_for("blue") == "push the blue block over the line"
    with pytest.raises(ValueError, match="'pink'; there are: red, green, blue"):
        task.instruction_for("pink")


def test_blocks_fill_the_start_area_one_in_a_lane():
    places = [task.place_blocks(np.random.default_rng(seed)) for seed in range(300)]
    x, y, yaw = np.array([[blocks[c] for c in ("red", "green", "blue")] for blocks in places]).transpose(2, 0, 1)
    assert 0.40 <= x.min() < 0.41
    assert 0.51 < x.max() <= 0.52
    assert -0.22 <= y.min() < -0.21
    assert 0.21 < y.max() <= 0.22
    assert np.abs(yaw).max() <= np.pi / 4
    # A block's half diagonal twice over, and 4 cm: pushed straight, none can touch another.
    assert np.diff(np.sort(y, axis=1)).min() > 0.05 * np.sqrt(2) + 0.04
    # No colour is bound to a side.
    assert (np.abs(y.mean(axis=0)) < 0.03).all()
