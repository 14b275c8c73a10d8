"""Where episodes begin and end, by each of the ways to say it, and what is told of idling."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dit_policy_training.conversion.annotations import read_annotations
from dit_policy_training.conversion.idle import Movement
from dit_policy_training.conversion.options import EpisodeOptions, OptionError, TimeOptions
from sampled import Sampled, sample, sample_bag, seconds
from toy_robot import MORE, START_NS, Recorded, messages, more_type, string, write_bag

from dit_policy_ros.embodiment import Embodiment

LENGTH = 8.0
STRING = "std_msgs/msg/String"
COMMANDS = "arm_controller/joint_trajectory"


def at(t: float) -> int:
    return START_NS + round(t * 1e9)


def told(*changes: tuple[float, str]) -> Callable[[Recorded], Iterable[Recorded]]:
    """The recording with these instructions."""

    def edit(m: Recorded) -> Iterable[Recorded]:
        if m.topic == "instruction":
            return [replace(m, receive_ns=at(t), msg=string(task)) for t, task in changes]
        return [m]

    return edit


def with_events(*events: tuple[float, str]) -> list[Recorded]:
    return [*messages(LENGTH), *(Recorded("operator/event", at(t), string(word), STRING) for t, word in events)]


def spans(sampled: Sampled) -> list[tuple[float, float]]:
    """The first and last tick of each episode that was kept, s from the start."""
    kept = [rows for rows, reason in zip(sampled.episodes, sampled.reasons, strict=True) if reason is None]
    return [(seconds(rows[0].stamp_ns), seconds(rows[-1].stamp_ns)) for rows in kept]


def ticks_within(start: float, end: float) -> tuple[float, float]:
    """The first and last tick in start <= t < end; the grid is 0.037 s plus tenths."""
    grid = [0.037 + k / 10 for k in range(-1, 100)]
    inside = [t for t in grid if start <= t < end]
    return pytest.approx(inside[0]), pytest.approx(inside[-1])


def test_changes_of_the_instruction_part_episodes(embodiment: Embodiment, tmp_path: Path) -> None:
    edit = told((0.0, "red"), (2.0, "red "), (3.0, "green"), (5.0, "red"), (7.7, "blue"))
    recorded = messages(LENGTH, edit=edit)
    sampled = sample(tmp_path, recorded, embodiment, episodes=EpisodeOptions(by="instruction"))
    assert spans(sampled) == [ticks_within(0, 3), ticks_within(3, 5), ticks_within(5, 7.7)]
    assert [episode.tasks for episode in sampled.account.episodes] == [
        [(0, "red")],
        [(0, "green")],
        [(0, "red")],
        [(0, "blue")],
    ]
    assert sampled.reasons[:3] == [None] * 3
    assert "s long, --episodes.min_seconds=0.5" in str(sampled.reasons[3])
    whole = sample(tmp_path, recorded, embodiment)
    assert len(whole.episodes) == 1
    assert [row.stamp_ns for row in whole.rows] == [row.stamp_ns for row in sampled.rows]


def test_a_gap_drops_only_the_instruction_it_is_in(embodiment: Embodiment, tmp_path: Path) -> None:
    """Even where the same instruction comes again later."""
    edit = told((0.0, "red"), (3.0, "green"), (5.0, "red"))

    def silent(m: Recorded) -> Iterable[Recorded]:
        return edit(m) if m.topic != "side/image_raw" or not 1.0 < seconds(m.receive_ns) < 2.0 else []

    sampled = sample(
        tmp_path,
        messages(LENGTH, edit=silent),
        embodiment,
        episodes=EpisodeOptions(by="instruction"),
        time=TimeOptions(on_gap="drop"),
    )
    assert "a gap in it (--time.on_gap=drop): side at" in str(sampled.reasons[0])
    start, end = spans(sampled)[0], spans(sampled)[1]
    assert (start, end[0]) == (ticks_within(3, 5), ticks_within(5, 8)[0])
    assert len(sampled.episodes) == 3


def test_episodes_by_an_operators_events(embodiment: Embodiment, tmp_path: Path) -> None:
    events = with_events(
        (0.5, "start"),
        (1.5, " Stop\n"),
        (2.0, "start"),
        (2.8, "rerecord"),  # what began at 2.0 is bad: anew at once
        (3.5, "stop"),
        (4.0, "start"),
        (4.8, "stop"),
        (5.0, "discard"),  # takes back 4.0 to 4.8
        (5.5, "start"),
        (6.0, "discard"),  # the open one
        (6.5, "start"),  # never stopped
    )
    options = EpisodeOptions(by="events", topic="/operator/event")
    sampled = sample(tmp_path, events, embodiment, episodes=options)
    last = seconds(sampled.rows[-1].stamp_ns)
    assert spans(sampled) == [ticks_within(0.5, 1.5), ticks_within(2.8, 3.5), (ticks_within(6.5, 8)[0], last)]
    assert last > 7.6
    notes = " ".join(sampled.account.notes)
    assert "3 episodes were discarded by the operator" in notes
    assert "ends before its last episode is stopped" in notes


def test_events_that_do_not_fit_are_told(embodiment: Embodiment, tmp_path: Path) -> None:
    options = EpisodeOptions(by="events", topic="operator/event")
    events = with_events((0.3, "discard"), (0.5, "stop"), (1.0, "start"), (2.0, "start"), (3.0, "stop"))
    sampled = sample(tmp_path, events, embodiment, episodes=options)
    assert spans(sampled) == [ticks_within(1, 2), ticks_within(2, 3)]
    notes = " ".join(sampled.account.notes)
    assert all(part in notes for part in ("nothing to discard", "ends nothing", "comes without a stop"))
    with pytest.raises(ValueError, match=r"operator/event: 'go' at \d+\.\d+ s, expected one of start, stop, discard"):
        sample(tmp_path, with_events((0.5, "go")), embodiment, episodes=options)
    with pytest.raises(ValueError, match=r"no message on operator/event, which marks episodes"):
        sample(tmp_path, messages(1.0), embodiment, episodes=options)
    with pytest.raises(ValueError, match=r"no episode in it by --episodes\.by=events: 1 episode was discarded"):
        sample(tmp_path, with_events((0.5, "start"), (2.0, "discard")), embodiment, episodes=options)
    with pytest.raises(OptionError, match=r"expected the std_msgs/String topic as --episodes\.topic"):
        sample(tmp_path, messages(1.0), embodiment, episodes=EpisodeOptions(by="events"))
    with pytest.raises(OptionError, match=r"--episodes\.by=mood: expected one of bag, instruction, events"):
        sample(tmp_path, messages(1.0), embodiment, episodes=EpisodeOptions(by="mood"))


def calls(service: str, *requests: tuple[float, Any], both_sides: bool = True) -> list[Recorded]:
    """A service's introspection: the client's and the server's events of each call, and the answers."""
    topic, kind = "operator/_service_event", f"{service}_Event"
    info = MORE.types["service_msgs/msg/ServiceEventInfo"]
    time = MORE.types["builtin_interfaces/msg/Time"]
    recorded = []
    for number, (t, request) in enumerate(requests):
        for event_type in (0, 1, 2, 3) if both_sides else (1, 2):
            gid = np.arange(16, dtype=np.uint8)
            content = [request] if event_type < 2 and request is not None else []
            message = more_type(kind)(info(event_type, time(0, 0), gid, number), content, [])
            recorded.append(Recorded(topic, at(t) + event_type * 100_000, message, kind))
    return recorded


def test_episodes_by_calls_of_set_bool(embodiment: Embodiment, tmp_path: Path) -> None:
    request = more_type("std_srvs/srv/SetBool_Request")
    made = calls("std_srvs/srv/SetBool", (1.0, request(True)), (3.0, request(False)), (4.0, request(True)))
    options = EpisodeOptions(by="service", topic="/operator/")
    sampled = sample(tmp_path, [*messages(LENGTH), *made], embodiment, MORE, episodes=options)
    assert spans(sampled)[0] == ticks_within(1, 3)
    assert spans(sampled)[1][0] == ticks_within(4, 8)[0]
    assert len(sampled.episodes) == 2
    blind = calls("std_srvs/srv/SetBool", (1.0, None))
    with pytest.raises(ValueError, match=r"operator/_service_event: the call at .* was recorded without its content"):
        sample(tmp_path, [*messages(LENGTH), *blind], embodiment, MORE, episodes=options)
    with pytest.raises(ValueError, match=r"no message on other/_service_event.*--include-hidden-topics"):
        sample(tmp_path, messages(1.0), embodiment, episodes=EpisodeOptions(by="service", topic="other"))


@pytest.mark.parametrize("both_sides", [True, False])
def test_episodes_by_calls_of_trigger(embodiment: Embodiment, tmp_path: Path, both_sides: bool) -> None:
    made = calls("std_srvs/srv/Trigger", *((t, None) for t in (1.0, 2.0, 3.0, 4.5)), both_sides=both_sides)
    options = EpisodeOptions(by="service", topic="operator")
    sampled = sample(tmp_path, [*messages(LENGTH), *made], embodiment, MORE, episodes=options)
    assert spans(sampled) == [ticks_within(1, 2), ticks_within(3, 4.5)]


def test_episodes_by_calls_that_set_an_instruction(embodiment: Embodiment, tmp_path: Path) -> None:
    """The calls tell the tasks, so the bag needs no instruction topic."""
    request = more_type("dit_policy_msgs/srv/SetInstruction_Request")
    service = "dit_policy_msgs/srv/SetInstruction"
    made = calls(service, (1.0, request("red")), (3.0, request("  ")), (4.0, request(" green ")))
    uninstructed = [m for m in messages(LENGTH) if m.topic != "instruction"]
    options = EpisodeOptions(by="service", topic="operator")
    sampled = sample(tmp_path, [*uninstructed, *made], embodiment, MORE, episodes=options)
    assert [{row.task for row in rows} for rows in sampled.episodes] == [{"red"}, {"green"}]
    assert spans(sampled)[0] == ticks_within(1, 4)


CSV = """bag,start,end,task
bag_0,1.0,2.5,push the red block
bag_0,4,6,"push, then pull"
other,0,1,something else
"""
YAML = """
- {bag: bag_0.mcap, start: 1.0, end: 2.5, task: push the red block}
- bag: bag_0
  start: 4
  end: 6
  task: push, then pull
"""


@pytest.mark.parametrize(("suffix", "text"), [("csv", CSV), ("yaml", YAML.replace(".mcap", ""))])
def test_episodes_by_annotations(embodiment: Embodiment, tmp_path: Path, suffix: str, text: str) -> None:
    """They tell the tasks; times count from the bag's first message."""
    path = tmp_path / f"takes.{suffix}"
    path.write_text(text)
    (tmp_path / "bags").mkdir()
    uninstructed = [m for m in messages(LENGTH) if m.topic != "instruction"]
    first = min(seconds(m.receive_ns) for m in uninstructed)
    options = EpisodeOptions(by="annotations", annotations=path)
    sampled = sample(tmp_path / "bags", uninstructed, embodiment, episodes=options)
    assert spans(sampled) == [ticks_within(first + 1, first + 2.5), ticks_within(first + 4, first + 6)]
    assert [{row.task for row in rows} for rows in sampled.episodes] == [{"push the red block"}, {"push, then pull"}]
    with pytest.raises(ValueError, match=r"no annotation for bag_1"):
        sample(tmp_path / "bags", uninstructed, embodiment, episodes=options)


def test_an_annotation_beyond_the_bags_end_is_named(embodiment: Embodiment, tmp_path: Path) -> None:
    path = tmp_path / "takes.csv"
    path.write_text("bag,start,end,task\nshort,0,9,push\n")
    write_bag(tmp_path / "short", messages(1.0))
    with pytest.raises(ValueError, match=r"takes\.csv, line 2: end is 9\.0 s, but the bag is 0\.9\d\d s long"):
        sample_bag(tmp_path / "short", embodiment, episodes=EpisodeOptions(by="annotations", annotations=path))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "bag,begin,end,task\n", [r"line 1: found 'bag,begin,end,task', expected the header"]),
        (
            "a.csv",
            "bag,start,end,task\nb,1,2,push, pull\nb,x,3,go\nb,5,4,go\nb,5,6, \n",
            [
                "line 2: 5 values, expected 4",
                "line 3: start is 'x', expected a number",
                "line 4: from 5.0 to 4.0 s",
                "line 5: task is empty",
            ],
        ),
        (
            "a.csv",
            "bag,start,end,task\nb,1,3,go\nb,2,4,go\n",
            ["line 3 begins at 2.0 s, before the end of a.csv, line 2"],
        ),
        ("a.csv", "bag,start,end,task\n", ["it names no episode"]),
        ("a.csv", "bag,start,end,task\nb,nan,4,go\n", ["start is 'nan'"]),
        ("a.yaml", "bag: b\n", ["expected a list"]),
        (
            "a.yaml",
            "- {bag: b, start: 1, end: 2, task: go}\n- {bag: b, start: 1, stop: 2, task: go}\n- b\n",
            [
                "line 2: found bag, start, stop, task, expected each of bag, start, end, task once",
                "line 3: expected bag",
            ],
        ),
        ("a.yaml", "- {bag: b, start: 1, end: [2], task: go}\n", ["line 1: end is a list or mapping"]),
        ("a.yaml", "- {bag: b", ["cannot be read"]),
        ("a.txt", "", ["expected a file called .csv, .yaml or .yml"]),
    ],
)
def test_mistakes_in_annotations_are_named_with_their_line(
    tmp_path: Path, name: str, text: str, said: list[str]
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(OptionError) as error:
        read_annotations(tmp_path / name)
    for part in said:
        assert part in str(error.value)


def test_an_annotation_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere\.csv: cannot be read"):
        read_annotations(tmp_path / "nowhere.csv")


def still(*times: tuple[float, float]) -> Callable[[Recorded], Iterable[Recorded]]:
    """The recording with the joints standing still at these times, but for noise of 0.1 mrad; elsewhere as ever."""
    rng = np.random.default_rng(1)

    def edit(m: Recorded) -> Iterable[Recorded]:
        t = seconds(m.receive_ns)
        if m.topic == "joint_states" and any(start <= t < end for start, end in times):
            order = np.argsort([["lift", "turn", "reach", "gripper"].index(name) for name in m.msg.name])
            values = np.empty(4)
            values[order] = rng.uniform(-1e-4, 1e-4, 4)
            m = replace(m, msg=replace(m.msg, position=values))
        yield m

    return edit


def test_idling_is_told_of_every_episode(embodiment: Embodiment, tmp_path: Path) -> None:
    sampled = sample(tmp_path, messages(LENGTH, edit=still((0.0, 2.0), (6.0, 8.0))), embodiment)
    (episode,) = sampled.account.episodes
    # The 0.2 s before an instant tell, so standing still is known 0.2 s after it began, and for 0.1 s too long at most.
    assert episode.idle_start == pytest.approx(2.0, abs=0.15)
    assert episode.idle_end == pytest.approx(8.0 - 6.2, abs=0.25)
    assert episode.idle_share == pytest.approx((episode.idle_start + episode.idle_end) / episode.seconds)
    moving = sample(tmp_path, messages(LENGTH), embodiment).account.episodes[0]
    assert (moving.idle_share, moving.idle_start, moving.idle_end) == (0, 0, 0)
    # A sine's peak speed, as a mean over the 0.1 s between two frames, is hardly less.
    expected = {"lift": 0.5 * 1.3, "turn": 1.3, "reach": 0.7 * 1.3}
    assert moving.peak_speed == {joint: pytest.approx(speed, rel=0.01) for joint, speed in expected.items()}


def test_movement_of_known_frames() -> None:
    """Four frames still, four at 0.1 rad a frame, three still, at 10 Hz."""
    way = [0.0, 0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4]
    movement = Movement(fps=10, idle_speed=0.02)
    for index, place in enumerate(way):
        movement.add(index * 10**8, np.float32([place, 0.0]))
    # Idle are frames 0 to 3, and 9 and 10: the window of 0.2 s before frame 8 still holds the last step.
    assert movement.idle_start == pytest.approx(0.4)
    assert movement.idle_end == pytest.approx(0.2)
    assert movement.idle_share == pytest.approx(6 / 11)
    assert movement.peak_speeds(["one", "other"]) == {"one": pytest.approx(1.0, rel=1e-6), "other": 0.0}


@pytest.mark.parametrize("by", ["bag", "events", "instruction"])
def test_idle_ends_are_trimmed_if_asked(embodiment: Embodiment, tmp_path: Path, by: str) -> None:
    recorded = [
        *messages(LENGTH, edit=still((0.0, 2.0), (3.5, 4.5), (6.0, 8.0))),
        Recorded("operator/event", at(0.2), string("start"), STRING),
        Recorded("operator/event", at(7.5), string("stop"), STRING),
    ]
    options = EpisodeOptions(by=by, topic="operator/event", trim_idle=True, idle_margin=0.3)
    sampled = sample(tmp_path, recorded, embodiment, episodes=options)
    ((start, end),) = spans(sampled)
    # From 0.3 s before the first movement, which may have begun 0.2 s before it shows; the pause in the middle stays.
    assert 2.0 - 0.3 - 0.2 <= start <= 2.0 - 0.3 + 0.1
    assert 6.0 + 0.3 - 0.1 <= end <= 6.0 + 0.3 + 0.2
    assert sampled.account.idle_trimmed == pytest.approx(
        LENGTH - (end - start) - (0.7 if by == "events" else 0), abs=0.3
    )


def test_a_take_in_which_nothing_moves_is_left_out_when_trimming(embodiment: Embodiment, tmp_path: Path) -> None:
    recorded = [
        *messages(LENGTH, edit=still((0.0, 4.0))),
        *(Recorded("operator/event", at(t), string(w), STRING) for t, w in ((0.5, "start"), (3.0, "stop"))),
        *(Recorded("operator/event", at(t), string(w), STRING) for t, w in ((4.5, "start"), (7.0, "stop"))),
    ]
    options = EpisodeOptions(by="events", topic="operator/event", trim_idle=True)
    sampled = sample(tmp_path, recorded, embodiment, episodes=options)
    assert spans(sampled) == [ticks_within(4.5, 7.0)]
    assert any("nothing moves from" in note for note in sampled.account.notes)
