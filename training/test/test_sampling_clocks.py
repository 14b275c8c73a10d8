"""Clocks at their worst: slow transport, sensors stamped far apart, one wild stamp, two messages at one instant."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dit_policy_training.conversion.options import EpisodeOptions, TimeOptions, VectorOptions
from sampled import sample, seconds
from toy_robot import START_NS, STORE, Recorded, messages, string, trajectory, with_header_ns

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.messages import stamp_ns

CAMERAS = ("side/image_raw", "hand/image_raw/compressed")
COMMANDS = "arm_controller/joint_trajectory"
SECOND = 10**9


def test_an_episode_begins_with_the_first_message_after_a_gap_though_it_travelled_long(
    embodiment: Embodiment, tmp_path: Path
) -> None:
    def slow_with_a_hole(m: Recorded) -> Iterable[Recorded]:
        if m.topic != CAMERAS[0]:
            yield m
        elif not 1.5 < seconds(stamp_ns(m.msg)) < 3.0:
            yield replace(m, receive_ns=m.receive_ns + SECOND // 2)

    recorded = messages(6.0, edit=slow_with_a_hole)
    sampled = sample(tmp_path, recorded, embodiment)
    again = min(t for m in recorded if m.topic == CAMERAS[0] and (t := seconds(stamp_ns(m.msg))) > 2)
    assert [len(rows) > 10 for rows in sampled.episodes] == [True, True]
    assert again <= seconds(sampled.episodes[1][0].stamp_ns) < again + 0.1
    assert sampled.account.gaps[0].end - sampled.account.gaps[0].start == pytest.approx(again - 1.5, abs=0.2)


def test_sensors_whose_stamps_are_far_apart_but_within_max_skew(embodiment: Embodiment, tmp_path: Path) -> None:
    """One camera is stamped 0.9 s ahead, the other 0.9 s behind: the first one's pictures must wait for the other's."""
    offsets = {CAMERAS[0]: 900_000_000, CAMERAS[1]: -900_000_000}

    def apart(m: Recorded) -> Iterable[Recorded]:
        by_ns = offsets.get(m.topic)
        yield m if by_ns is None else replace(m, msg=with_header_ns(m.msg, stamp_ns(m.msg) + by_ns))

    sampled = sample(tmp_path, messages(6.0, edit=apart), embodiment)
    assert sampled.account.gaps == []
    ((first, *_, last),) = sampled.episodes
    assert seconds(first.stamp_ns) == pytest.approx(0.9, abs=0.1)
    assert seconds(last.stamp_ns) == pytest.approx(6.0 - 0.9, abs=0.2)


@pytest.mark.parametrize("rule", ["next_state", "nearest", "interpolate"])
def test_a_message_between_a_row_and_what_it_looks_ahead_to_is_too_late(
    embodiment: Embodiment, tmp_path: Path, rule: str
) -> None:
    """The joints of 20 ms are on their way until a row is made, and no later one, that would have been made of them."""
    is_next = rule == "next_state"
    options = {
        "fps": 7,  # so that the joints' stamps wander between the rows
        "time": TimeOptions(sampling={} if is_next else {"state": rule}),
        "vectors": VectorOptions(action_from="next_state" if is_next else "commands"),
    }
    recorded = messages(3.0)
    intact = sample(tmp_path, recorded, embodiment, **options)
    stamps = [stamp_ns(m.msg) for m in recorded if m.topic == "joint_states"]
    row, held_ns = next(
        (row, stamp)
        for row in intact.rows[5:]
        for stamp in stamps
        if 0 < (row.stamp_ns + SECOND // 7 - stamp if is_next else stamp - row.stamp_ns) < 9_000_000
    )

    def held(m: Recorded) -> Iterable[Recorded]:
        by_ns = 45_000_000 if is_next else 160_000_000
        is_it = m.topic == "joint_states" and stamp_ns(m.msg) == held_ns
        yield replace(m, receive_ns=m.receive_ns + by_ns) if is_it else m

    sampled = sample(tmp_path, messages(3.0, edit=held), embodiment, **options)
    differing = [
        other.stamp_ns
        for one, other in zip(intact.rows, sampled.rows, strict=True)
        if not np.array_equal(
            np.concatenate([one.frame["observation.state"], one.action]),
            np.concatenate([other.frame["observation.state"], other.action]),
        )
    ]
    assert row.stamp_ns in differing
    (state,) = [stream for stream in sampled.account.streams if stream.name == "state"]
    assert (state.late, state.too_late) == (1, 1)


def test_of_two_messages_told_at_one_instant_the_second_counts(embodiment: Embodiment, tmp_path: Path) -> None:
    """As for the robot. It happens where the recorder's clock is a simulation's, which stands still between steps."""

    def twice(m: Recorded) -> Iterable[Recorded]:
        if m.topic == "instruction":
            yield from (replace(m, receive_ns=m.receive_ns + SECOND, msg=string(text)) for text in ("first", "second"))
        yield m
        if m.topic == COMMANDS:
            yield replace(m, msg=trajectory(["lift", "turn"], [(0.01, [1.25, 1.5], [])]))

    # Two per command, of which the first is the toy robot's: the action is the second's, 10 ms after it came.
    recorded = [m for m in messages(3.0, edit=twice) if m.topic != COMMANDS or seconds(m.receive_ns) < 1]
    for by in ("bag", "instruction"):
        options = EpisodeOptions(by=by, trim_idle=by == "instruction")
        sampled = sample(tmp_path, recorded, embodiment, episodes=options)
        assert list(dict.fromkeys(row.task for row in sampled.rows)) == ["push the red block", "second"]
        assert not any("nothing moves" in note for note in sampled.account.notes)
        late = np.array([row.action for row in sampled.rows if seconds(row.stamp_ns) > 1])
        assert len(late) > 10
        np.testing.assert_array_equal(late, np.tile(np.array([1.5, 1.25], np.float32), (len(late), 1)))


def test_of_two_position_commands_at_one_instant_the_second_counts(embodiment: Embodiment, tmp_path: Path) -> None:
    (group,) = embodiment.action_groups
    held = replace(embodiment, action_groups=(replace(group, topic="arm/commands", interface="position"),))
    kind = "std_msgs/msg/Float64MultiArray"
    array, layout = STORE.types[kind], STORE.types["std_msgs/msg/MultiArrayLayout"]
    recorded = [m for m in messages(2.0) if m.topic != COMMANDS]
    start_ns = recorded[0].receive_ns
    recorded += [
        Recorded("arm/commands", start_ns + SECOND // 2, array(layout([], 0), np.array(values)), kind)
        for values in ([1.0, 2.0], [0.25, 0.5])
    ]
    sampled = sample(tmp_path, recorded, held)
    assert len(sampled.rows) > 10
    for row in sampled.rows:
        np.testing.assert_array_equal(row.action, np.array([0.25, 0.5], np.float32))


def test_one_wild_stamp_does_not_make_the_rest_idle(embodiment: Embodiment, tmp_path: Path) -> None:
    """A joint state stamped 100 s ahead is of no row; what comes after it is not late, and moves."""
    recorded = [*messages(6.0)]
    index = next(i for i, m in enumerate(recorded) if m.topic == "joint_states" and seconds(m.receive_ns) > 2)
    wild = recorded[index]
    recorded[index] = replace(wild, msg=with_header_ns(wild.msg, wild.receive_ns + 100 * SECOND))
    words = ((0.5, "start"), (1.8, "stop"), (3.0, "start"), (5.0, "stop"))
    recorded += [
        Recorded("operator", recorded[0].receive_ns + round(t * SECOND), string(word), "std_msgs/msg/String")
        for t, word in words
    ]
    options = EpisodeOptions(by="events", topic="operator", trim_idle=True)
    sampled = sample(tmp_path, recorded, embodiment, episodes=options)
    assert [len(rows) for rows in sampled.episodes] == [pytest.approx(13, abs=2), pytest.approx(20, abs=2)]


def test_a_simulation_recorded_with_its_own_time_begins_at_zero(embodiment: Embodiment, tmp_path: Path) -> None:
    def simulated(m: Recorded) -> Iterable[Recorded]:
        receive_ns = m.receive_ns - START_NS
        if m.topic in (*CAMERAS, "joint_states"):
            m = replace(m, msg=with_header_ns(m.msg, stamp_ns(m.msg) - START_NS))
        yield replace(m, receive_ns=receive_ns)

    plain = sample(tmp_path, messages(3.0), embodiment)
    recorded = messages(3.0, edit=simulated)
    assert min(stamp_ns(m.msg) for m in recorded if m.topic == "joint_states") == 0
    sampled = sample(tmp_path, recorded, embodiment)
    assert [row.stamp_ns for row in sampled.rows] == [row.stamp_ns - START_NS for row in plain.rows]
    for row, expected in zip(sampled.rows, plain.rows, strict=True):
        np.testing.assert_array_equal(row.action, expected.action)
        np.testing.assert_array_equal(row.frame["observation.state"], expected.frame["observation.state"])


def test_annotations_that_overlap_under_two_names_of_a_bag(embodiment: Embodiment, tmp_path: Path) -> None:
    bags, path = tmp_path / "bags", tmp_path / "takes.csv"
    bags.mkdir()
    path.write_text("bag,start,end,task\nbag_0,0.5,1.8,push\nbags/bag_0,1.5,2.5,pull\n")
    options = EpisodeOptions(by="annotations", annotations=path)
    with pytest.raises(ValueError, match=r"takes\.csv, line 3: begins at 1\.5 s, within another episode of this bag"):
        sample(bags, messages(3.0), embodiment, episodes=options)
