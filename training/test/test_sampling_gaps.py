"""Silent, late, damaged and jumping streams: no row is made of them, every other row is the intact bag's."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dit_policy_training.conversion.options import TimeOptions
from dit_policy_training.conversion.sampling import Row
from sampled import Sampled, sample, seconds
from toy_robot import START_NS, Recorded, messages, stamp, with_header_ns

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.runtime.messages import stamp_ns

SIDE, HAND, JOINTS = "side/image_raw", "hand/image_raw/compressed", "joint_states"
COMMANDS = "arm_controller/joint_trajectory"
LENGTH = 6.0
Edit = Callable[[Recorded], Iterable[Recorded]]


@pytest.fixture(scope="module")
def intact(embodiment: Embodiment, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Row]:
    """Rows of the recording that nothing happened to, by their instant."""
    rows = sample(tmp_path_factory.mktemp("bags"), messages(LENGTH), embodiment).rows
    return {row.stamp_ns: row for row in rows}


def assert_true(sampled: Sampled, intact: dict[int, Row], but: Callable[[Row], bool] = lambda row: False) -> None:
    """Every row is that of the intact bag, `but` for the actions of some."""
    for row in sampled.rows:
        true = intact[row.stamp_ns]
        assert row.task == true.task
        if not but(row):
            np.testing.assert_array_equal(row.action, true.action)
        for key, value in row.frame.items():
            np.testing.assert_array_equal(value, true.frame[key])


def absent(topic: str, start: float, end: float) -> Edit:
    """The topic's messages stamped in this time are lost."""
    return lambda m: [] if m.topic == topic and start < seconds(stamp_ns(m.msg)) < end else [m]


def stamps_of(recorded: list[Recorded], topic: str) -> np.ndarray:
    return np.array([seconds(stamp_ns(m.msg)) for m in recorded if m.topic == topic])


@pytest.mark.parametrize(("topic", "stream"), [(SIDE, "side"), (JOINTS, "state")])
@pytest.mark.parametrize("away", [0.45, 1.2, 3.0])
def test_a_silent_stream_splits_the_episode(
    embodiment: Embodiment, tmp_path: Path, intact: dict[int, Row], topic: str, stream: str, away: float
) -> None:
    """However long it is away, the episode ends with its last message and the next begins with its first."""
    recorded = messages(LENGTH, edit=absent(topic, 1.5, 1.5 + away))
    sampled = sample(tmp_path, recorded, embodiment)
    stamps = stamps_of(recorded, topic)
    last = stamps[stamps <= 1.5].max()
    # A command just after the last joints sets out from these, as long as they are not too old.
    assert_true(sampled, intact, but=lambda row: topic == JOINTS and last < seconds(row.stamp_ns) + 0.1 < last + 0.2)
    first = stamps[stamps > last].min()
    if topic == JOINTS:  # a command sets out from the joints, so the first one after the silence is the first to follow
        again = next(seconds(m.receive_ns) for m in recorded if m.topic == COMMANDS and seconds(m.receive_ns) > first)
        first = max(first, again - 0.1)
    (gap,) = sampled.account.gaps
    assert (gap.stream, gap.kind) == (stream, "stale")
    assert gap.start == pytest.approx(last)
    assert first - 1e-6 <= gap.end < first + 0.1
    assert f"no message on {topic}" in gap.reason
    assert sampled.reasons == [None, None]
    expected = [at for at in sorted(intact) if not last < seconds(at) < first - 1e-6]
    assert [row.stamp_ns for row in sampled.rows] == expected
    (account,) = [each for each in sampled.account.streams if each.name == stream]
    assert account.longest_pause == pytest.approx(np.diff(stamps).max())


def test_a_pause_within_max_age_is_no_gap(embodiment: Embodiment, tmp_path: Path, intact: dict[int, Row]) -> None:
    sampled = sample(tmp_path, messages(LENGTH, edit=absent(SIDE, 2.0, 2.2)), embodiment)
    assert [row.stamp_ns for row in sampled.rows] == sorted(intact)
    assert sampled.account.gaps == []
    assert 0.1 < max(row.ages["side"] for row in sampled.rows) < 0.3


def test_a_gap_drops_the_episode_or_refuses_the_bag_as_asked(embodiment: Embodiment, tmp_path: Path) -> None:
    recorded = messages(LENGTH, edit=absent(HAND, 2.0, 3.0))
    with pytest.raises(
        ValueError, match=r"no episode can be kept: a gap in it \(--time\.on_gap=drop\): hand at .* s: "
    ):
        sample(tmp_path, recorded, embodiment, time=TimeOptions(on_gap="drop"))
    with pytest.raises(ValueError, match=r"a gap in an episode \(--time\.on_gap=refuse\): hand at"):
        sample(tmp_path, recorded, embodiment, time=TimeOptions(on_gap="refuse"))
    with pytest.raises(ValueError, match=r"--time\.on_gap=guess: expected one of split, drop, refuse"):
        sample(tmp_path, recorded, embodiment, time=TimeOptions(on_gap="guess"))


@pytest.mark.parametrize("on_gap", ["split", "refuse"])
def test_a_stream_that_ends_early_trims_the_end(
    embodiment: Embodiment, tmp_path: Path, intact: dict[int, Row], on_gap: str
) -> None:
    recorded = messages(LENGTH, edit=absent(HAND, 3.0, 99.0))
    sampled = sample(tmp_path, recorded, embodiment, time=TimeOptions(on_gap=on_gap))
    assert_true(sampled, intact)
    last = stamps_of(recorded, HAND).max()
    assert [row.stamp_ns for row in sampled.rows] == [at for at in sorted(intact) if seconds(at) <= last]
    assert sampled.account.gaps == []
    assert sampled.account.trimmed_stream == "hand"
    assert sampled.account.trimmed == pytest.approx(seconds(recorded[-1].receive_ns) - last)


def test_cameras_too_far_apart_make_no_row(embodiment: Embodiment, tmp_path: Path, intact: dict[int, Row]) -> None:
    recorded = messages(LENGTH, edit=absent(HAND, 2.0, 2.2))
    sampled = sample(tmp_path, recorded, replace(embodiment, max_camera_skew=0.15))
    (gap,) = sampled.account.gaps
    assert (gap.stream, gap.kind) in {("side", "skew"), ("hand", "skew"), ("cameras", "skew")}
    assert "camera 'hand' is 0." in gap.reason
    sides, hands = stamps_of(recorded, SIDE), stamps_of(recorded, HAND)
    for row in intact.values():
        at = seconds(row.stamp_ns)
        apart = abs(sides[sides <= at].max() - hands[hands <= at].max())
        assert (row.stamp_ns in {each.stamp_ns for each in sampled.rows}) == (apart <= 0.15)


def test_a_damaged_picture_makes_no_row(embodiment: Embodiment, tmp_path: Path, intact: dict[int, Row]) -> None:
    def cut(m: Recorded) -> Iterable[Recorded]:
        if m.topic == HAND and 2.0 < seconds(stamp_ns(m.msg)) < 2.3:
            m = replace(m, msg=replace(m.msg, data=m.msg.data[: len(m.msg.data) // 2]))
        yield m

    sampled = sample(tmp_path, messages(LENGTH, edit=cut), embodiment)
    assert_true(sampled, intact)
    (gap,) = sampled.account.gaps
    assert (gap.stream, gap.kind) == ("hand", "damaged")
    assert "damaged or cut short" in gap.reason
    assert 2 <= len(intact) - len(sampled.rows) <= 4
    assert len(sampled.episodes) == 2


def other_size(m: Recorded) -> Iterable[Recorded]:
    if m.topic == SIDE and seconds(m.receive_ns) > 2.0:
        m = replace(m, msg=replace(m.msg, height=16, width=48, data=m.msg.data[: 16 * 48 * 3]))
    yield m


def other_encoding(m: Recorded) -> Iterable[Recorded]:
    yield replace(m, msg=replace(m.msg, encoding="rgb16")) if m.topic == SIDE else m


def joint_lost(m: Recorded) -> Iterable[Recorded]:
    if m.topic == JOINTS and seconds(m.receive_ns) > 2.0:
        m = replace(m, msg=replace(m.msg, name=["other" if name == "turn" else name for name in m.msg.name]))
    yield m


def joint_nan(m: Recorded) -> Iterable[Recorded]:
    if m.topic == JOINTS and seconds(m.receive_ns) > 2.0:
        m = replace(m, msg=replace(m.msg, position=np.full(4, np.nan)))
    yield m


def unstamped(m: Recorded) -> Iterable[Recorded]:
    yield replace(m, msg=with_header_ns(m.msg, 0)) if m.topic == SIDE else m


def unstamped_later(m: Recorded) -> Iterable[Recorded]:
    yield from unstamped(m) if seconds(m.receive_ns) > 2.0 else [m]


def ahead(by: float) -> Edit:
    def edit(m: Recorded) -> Iterable[Recorded]:
        yield replace(m, msg=with_header_ns(m.msg, stamp_ns(m.msg) + round(by * 1e9))) if m.topic == HAND else m

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (other_size, r"side/image_raw', stamp 17000000\d\d\.\d{9}: found an image of 48x16 pixels; expected 48x32"),
        (other_encoding, r"side/image_raw.*'rgb16'"),
        (joint_lost, r"joint_states', stamp 17000000\d\d\.\d{9}: found no turn"),
        (joint_nan, r"joint_states', stamp .*: found position of '\w+' is nan"),
        (unstamped, r"side/image_raw: the header stamp .* is zero.*--time\.stamps='\{side/image_raw: receive\}'"),
        (unstamped_later, r"side/image_raw: the header stamp .* is zero"),
        (ahead(2.0), r"hand/image_raw/compressed: stamped .*, received .*; allowed are 1\.0 s .*--time\.max_skew"),
        (absent(SIDE, -1, 99), r"no message on side/image_raw; topics with messages: .*/joint_states"),
    ],
)
def test_what_is_wrong_throughout_refuses_the_bag(
    embodiment: Embodiment, tmp_path: Path, edit: Edit, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        sample(tmp_path, messages(3.0, edit=edit), embodiment)


def test_more_skew_where_allowed(embodiment: Embodiment, tmp_path: Path) -> None:
    """A camera whose clock is 1.4 s behind: its pictures are late by so much, and all its rows are there."""
    recorded = messages(LENGTH, edit=ahead(-1.4))
    sampled = sample(tmp_path, recorded, embodiment, time=TimeOptions(max_skew=1.5))
    stamps = stamps_of(recorded, HAND)
    assert len(sampled.rows) > 35
    assert len(sampled.episodes) == 1
    for row in sampled.rows:
        at = seconds(row.stamp_ns)
        assert row.ages["hand"] == pytest.approx(at - stamps[stamps <= at].max())
    (hand,) = [stream for stream in sampled.account.streams if stream.name == "hand"]
    assert hand.skew_median == pytest.approx(-1.41, abs=0.01)


def jumping(m: Recorded) -> Iterable[Recorded]:
    if m.topic == SIDE:
        off = 0.7 if seconds(m.receive_ns) < 3.0 else -0.7
        m = replace(m, msg=with_header_ns(m.msg, stamp_ns(m.msg) + round(off * 1e9)))
    yield m


def test_a_clock_that_jumps_parts_what_was_before_from_what_comes_after(embodiment: Embodiment, tmp_path: Path) -> None:
    recorded = messages(LENGTH, edit=jumping)
    sampled = sample(tmp_path, recorded, embodiment)
    assert len(sampled.episodes) == 2
    (gap,) = sampled.account.gaps
    assert (gap.stream, gap.kind) == ("side", "clock")
    assert "header stamps of side/image_raw jumped from" in gap.reason
    (side,) = [stream for stream in sampled.account.streams if stream.name == "side"]
    assert side.clock_jumps == 1
    # By either clock, a row's picture is the newest of that clock's.
    for episode, off in zip(sampled.episodes, (0.7, -0.7), strict=True):
        own = [m for m in recorded if m.topic == SIDE and (seconds(m.receive_ns) < 3.0) == (off > 0)]
        stamps = np.array([seconds(stamp_ns(m.msg)) for m in own])
        for row in episode:
            message = own[int(np.flatnonzero(stamps <= seconds(row.stamp_ns))[-1])].msg
            expected = message.data.reshape(32, 48, 3)
            np.testing.assert_array_equal(row.frame["observation.images.side"], expected)


def test_stamps_out_of_all_bounds_for_a_while_are_a_gap(
    embodiment: Embodiment, tmp_path: Path, intact: dict[int, Row]
) -> None:
    def astray(m: Recorded) -> Iterable[Recorded]:
        if m.topic == SIDE and 2.0 < seconds(stamp_ns(m.msg)) < 3.0:
            m = replace(m, msg=with_header_ns(m.msg, stamp_ns(m.msg) + 3600 * 10**9))
        yield m

    sampled = sample(tmp_path, messages(LENGTH, edit=astray), embodiment)
    assert_true(sampled, intact)
    (gap,) = sampled.account.gaps
    assert gap.stream == "side"
    assert 1.9 < gap.start < 2.0 < 3.0 < gap.end < 3.2
    (side,) = [stream for stream in sampled.account.streams if stream.name == "side"]
    assert (side.astray, side.clock_jumps) == (15, 1)


def test_a_bag_with_an_hour_of_nothing_in_it(embodiment: Embodiment, tmp_path: Path) -> None:
    hour = 3600 * 10**9

    def later(m: Recorded) -> Recorded:
        msg = with_header_ns(m.msg, stamp_ns(m.msg) + hour) if stamped(m) else m.msg
        return replace(m, receive_ns=m.receive_ns + hour, msg=msg)

    def stamped(m: Recorded) -> bool:
        return m.topic in (SIDE, HAND, JOINTS)

    first = messages(2.0)
    sampled = sample(tmp_path, [*first, *map(later, first)], embodiment)
    assert len(sampled.episodes) == 2
    (gap,) = sampled.account.gaps
    assert gap.end - gap.start == pytest.approx(3598, abs=0.5)
    # Of the gap's sides each is the same recording.
    for one, other in zip(*sampled.episodes, strict=False):
        shift = other.stamp_ns - one.stamp_ns - hour
        assert abs(shift) < 100_000_000
    assert min(map(len, sampled.episodes)) > 15


def test_messages_twice_change_nothing_and_late_ones_are_counted(
    embodiment: Embodiment, tmp_path: Path, intact: dict[int, Row]
) -> None:
    held: list[Recorded] = []

    def shuffled(m: Recorded) -> Iterable[Recorded]:
        if m.topic == JOINTS and 2.0 < seconds(m.receive_ns) < 2.5:
            yield replace(m, receive_ns=m.receive_ns + 1_000_000)
        if m.topic == SIDE and 3.0 < seconds(stamp_ns(m.msg)) < 3.92:
            held.append(m)
            if len(held) % 2 == 0:  # each second picture before the one that was taken earlier
                before, after = held[-2:]
                yield replace(after, receive_ns=after.receive_ns)
                yield replace(before, receive_ns=after.receive_ns + 150_000_000)
            return
        yield m

    sampled = sample(tmp_path, messages(LENGTH, edit=shuffled), embodiment)
    accounts = {stream.name: stream for stream in sampled.account.streams}
    assert accounts["state"].duplicates == 24 or accounts["state"].duplicates == 25
    assert accounts["side"].late == len(held) // 2 == 7
    # A picture that came after its tick was made is the only thing that differs, and it is counted.
    differing = 0
    for row in sampled.rows:
        pictures = (row.frame["observation.images.side"], intact[row.stamp_ns].frame["observation.images.side"])
        differing += not np.array_equal(*pictures)
        np.testing.assert_array_equal(row.frame["observation.state"], intact[row.stamp_ns].frame["observation.state"])
    assert 1 <= differing <= accounts["side"].too_late


@pytest.mark.parametrize(("sampling", "bad"), [("nearest", 0.62), ("interpolate", 0.35)])
def test_gaps_by_each_rule(embodiment: Embodiment, tmp_path: Path, sampling: str, bad: float) -> None:
    """max_age is 0.3 s for pictures, 0.2 s for joints: nearest bridges twice that, interpolation needs both ends."""
    topic, name = (SIDE, "side") if sampling == "nearest" else (JOINTS, "state")

    def pausing(m: Recorded) -> Iterable[Recorded]:
        at = seconds(stamp_ns(m.msg)) if m.topic == topic else 0
        # After 2.0 s: a pause just within the rule; after 4.0 s one beyond it.
        within = 0.42 if sampling == "nearest" else 0.15
        return [] if 2.0 < at < 2.0 + within or 4.0 < at < 4.1 + bad else [m]

    options = TimeOptions(sampling={name: sampling})
    sampled = sample(tmp_path, messages(LENGTH, edit=pausing), embodiment, time=options)
    (gap,) = sampled.account.gaps
    assert (gap.stream, gap.kind) == (name, "stale")
    assert 3.9 < gap.start <= 4.0
    assert any(2.0 < seconds(row.stamp_ns) < 2.15 for row in sampled.rows)


@pytest.mark.parametrize(("sampling", "gaps"), [("as_of", 0), ("interpolate", 1)])
def test_interpolation_needs_the_later_reading_near_too(
    embodiment: Embodiment, tmp_path: Path, sampling: str, gaps: int
) -> None:
    """From 2.02 to 2.20 s: the tick at 2.037 s is 0.163 s before the later one, and the next lies beyond it."""
    robot = replace(embodiment, state=replace(embodiment.state, max_age=0.15))
    recorded = messages(3.0, edit=absent(JOINTS, 2.021, 2.199))
    sampled = sample(tmp_path, recorded, robot, time=TimeOptions(sampling={"state": sampling}))
    assert len(sampled.account.gaps) == gaps
    within = [row for row in sampled.rows if 2.02 < seconds(row.stamp_ns) < 2.2]
    assert bool(within) == (gaps == 0)


def test_a_command_given_while_the_joints_were_silent_is_not_followed(
    embodiment: Embodiment, tmp_path: Path, intact: dict[int, Row]
) -> None:
    """Where it set out from is not known. The joints are back at 4.5 s, the next command comes at 4.937 s."""
    lost = absent(JOINTS, 2.0, 4.5)

    def edit(m: Recorded) -> Iterable[Recorded]:
        return [] if m.topic == COMMANDS and 4.45 < seconds(m.receive_ns) < 4.93 else lost(m)

    sampled = sample(tmp_path, messages(LENGTH, edit=edit), embodiment)
    (gap,) = sampled.account.gaps
    assert gap.end == pytest.approx(4.837)
    for row in sampled.episodes[1]:
        np.testing.assert_array_equal(row.action, intact[row.stamp_ns].action)


def test_no_rows_at_all_names_the_most_common_reason(embodiment: Embodiment, tmp_path: Path) -> None:
    def every_cut(m: Recorded) -> Iterable[Recorded]:
        yield replace(m, msg=replace(m.msg, data=m.msg.data[:100])) if m.topic == HAND else m

    with pytest.raises(ValueError, match=r"no row can be made; most often: hand: .*damaged or cut short"):
        sample(tmp_path, messages(2.0, edit=every_cut), embodiment)


def test_a_clock_that_starts_wrong_and_is_set_right(embodiment: Embodiment, tmp_path: Path) -> None:
    """Within what is allowed, but more apart than that from one message to the next, before the grid has begun."""

    def early(m: Recorded) -> Iterable[Recorded]:
        if m.topic == JOINTS and seconds(m.receive_ns) < 0.02:
            m = replace(m, msg=replace(m.msg, header=replace(m.msg.header, stamp=stamp(START_NS + 990_000_000))))
        yield m

    sampled = sample(tmp_path, messages(3.0, edit=early), embodiment)
    (state,) = [stream for stream in sampled.account.streams if stream.name == "state"]
    assert state.clock_jumps == 0 or sampled.account.gaps[0].kind == "clock"
    assert sampled.rows[0].ages["state"] < 0.02
