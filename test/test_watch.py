"""The inputs' watchdog: every way in which a stream can go bad is told, by its cause, in time, and so is its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from stream_fixtures import MS, ROBOT, T0, add, joints, top, wrist

from dit_policy_ros.runtime import watch
from dit_policy_ros.runtime.faults import Fault
from dit_policy_ros.runtime.messages import stamp_ns
from dit_policy_ros.runtime.observations import ObservationBuffer
from dit_policy_ros.runtime.watch import InputWatch

TOP, WRIST, JOINTS = "top/image_raw", "wrist/compressed", "joint_states"
Make = Callable[[str, int], Any]


def good(topic: str, t_ns: int) -> Any:
    """The message of a healthy robot, whose joint a swings by no more than 1 rad/s."""
    if topic == TOP:
        return top(t_ns, 7)
    if topic == WRIST:
        return wrist(t_ns, 7)
    return joints(t_ns, np.sin((t_ns - T0) / 1e9))


class Robot:
    """Sends top and wrist every 30 ms and joints every 10 ms, and has the watch look each time, as a beat does."""

    def __init__(self) -> None:
        self.buffer = ObservationBuffer(ROBOT, 2)
        self.watch = InputWatch(ROBOT, self.buffer)
        self.ms = 0
        self.run(300)
        assert self.reasons == []

    @property
    def now_ns(self) -> int:
        return T0 + self.ms * MS

    @property
    def reasons(self) -> list[str]:
        troubles = self.watch.check(self.now_ns)
        assert all(trouble.fault is Fault.INPUT for trouble in troubles)
        return [trouble.reason for trouble in troubles]

    def run(self, duration_ms: int, **makes: Make) -> None:
        """`makes`: for top, wrist or joints another message than the good one, or None for none at all."""
        chosen = {topic: makes.get(name, good) for name, topic in (("top", TOP), ("wrist", WRIST), ("joints", JOINTS))}
        for _ in range(0, duration_ms, 10):
            self.ms += 10
            for topic, make in chosen.items():
                if topic == JOINTS or self.ms % 30 == 0:
                    message = make(topic, self.now_ns)
                    if message is not None:
                        add(self.buffer, (topic, message))
            self.watch.check(self.now_ns)

    def seconds_until_trouble(self, **makes: Make) -> float:
        """How long the robot runs so until the watch says something."""
        start = self.ms
        while not self.reasons:
            assert self.ms - start < 2000, "no trouble was seen"
            self.run(10, **makes)
        return (self.ms - start) / 1000


def silent(topic: str, t_ns: int) -> None:
    return None


def frozen(make: Make) -> Make:
    return lambda topic, t_ns: make(topic, T0 + 300 * MS)


def edited(**fields: Any) -> Make:
    def make(topic: str, t_ns: int) -> Any:
        message = good(topic, t_ns)
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    return make


def compressed(data: Callable[[bytes], bytes], suffix: str = ".jpg", kind: str = "jpeg", size: int = 16) -> Make:
    def make(topic: str, t_ns: int) -> Any:
        done, whole = cv2.imencode(suffix, np.zeros((8, size, 3), np.uint8))
        assert done
        message = good(topic, t_ns)
        message.format, message.data = kind, data(whole.tobytes())
        return message

    return make


FAULTS: dict[str, tuple[dict[str, Make], list[str]]] = {
    "camera stops": ({"top": silent}, [f"'{TOP}' (top)", "no new message for 0.310 s, allowed are 0.3 s"]),
    "joints stop": ({"joints": silent}, [f"'{JOINTS}' (state)", "no new message for 0.210 s"]),
    "camera freezes": ({"top": frozen(good)}, [f"'{TOP}' (top)", "frozen", "10 more messages"]),
    "compressed camera freezes": ({"wrist": frozen(good)}, [f"'{WRIST}' (wrist)", "frozen"]),
    "joints freeze": ({"joints": frozen(good)}, [f"'{JOINTS}' (state)", "frozen"]),
    "other size": ({"top": edited(width=3, height=8, step=9)}, [TOP, "3x8", "6x4", "camera 'top'"]),
    "other encoding": ({"top": edited(encoding="nv12")}, [TOP, "nv12"]),
    "an encoding of other length": ({"top": edited(encoding="rgba8")}, [TOP, "step 18", "at least 24"]),
    "data cut": ({"top": edited(data=bytes(71))}, [TOP, "71 bytes"]),
    "depth": ({"top": edited(encoding="16UC1")}, [TOP, "depth"]),
    "jpeg of other size": ({"wrist": compressed(lambda data: data, size=24)}, [WRIST, "24x8", "16x8"]),
    "garbage": ({"wrist": compressed(lambda data: bytes(reversed(data)))}, [WRIST, "damaged", "neither JPEG nor PNG"]),
    "empty": ({"wrist": compressed(lambda data: b"")}, [WRIST, "damaged", "empty"]),
    "cut jpeg": ({"wrist": compressed(lambda data: data[:-9])}, [WRIST, "damaged", "without its end"]),
    "jpeg cut in its header": ({"wrist": compressed(lambda data: data[:30])}, [WRIST, "cut in its header"]),
    "cut png": ({"wrist": compressed(lambda data: data[:-9], ".png", "png")}, [WRIST, "damaged", "without its end"]),
    "theora": ({"wrist": edited(format="theora")}, [WRIST, "theora"]),
    "NaN": ({"joints": edited(position=[0.0, 0.0, float("nan")])}, [JOINTS, "'a' is nan"]),
    "missing joint": ({"joints": edited(name=["b", "finger", "c"])}, [JOINTS, "no a"]),
    "fewer positions": ({"joints": edited(position=[0.0, 0.0])}, [JOINTS, "3 names but 2 values"]),
}
LIMITS_MS = {"top": 300, "wrist": 300, "joints": 200}


@pytest.mark.parametrize("name", FAULTS)
def test_a_stream_gone_bad_is_told_by_its_cause_once_its_max_age_is_over(name: str) -> None:
    makes, words = FAULTS[name]
    robot = Robot()
    (stream,) = makes
    # The last good message came at the start; a beat sees its age every 10 ms.
    assert robot.seconds_until_trouble(**makes) == pytest.approx(LIMITS_MS[stream] / 1000 + 0.01)
    (reason,) = robot.reasons
    for word in words:
        assert word in reason, reason
    robot.run(30)
    assert robot.reasons == []


@pytest.mark.parametrize("name", [name for name in FAULTS if "stop" not in name and "freeze" not in name])
def test_one_bad_message_among_good_ones_is_no_trouble_but_counted(name: str) -> None:
    makes, _ = FAULTS[name]
    robot = Robot()
    (stream,) = makes
    for _ in range(20):
        robot.run(30, **makes)
        robot.run(30)
        assert robot.reasons == []
    counts = robot.watch.invalid()
    bad = counts.pop("state" if stream == "joints" else stream)
    assert bad == (60 if stream == "joints" else 20)
    assert set(counts.values()) == {0}


@pytest.mark.parametrize(
    "make",
    [
        compressed(lambda data: data),
        compressed(lambda data: data, ".png", "rgb8; png compressed bgr8"),
        compressed(lambda data: data + bytes(500)),
    ],
    ids=["jpeg", "png", "padded jpeg"],
)
def test_good_pictures_of_other_kinds_are_no_trouble(make: Make) -> None:
    robot = Robot()
    robot.run(900, wrist=make)
    assert robot.reasons == []
    assert robot.watch.invalid() == {"top": 0, "wrist": 0, "state": 0}


def test_joint_states_without_velocity_and_with_other_joints_are_good() -> None:
    robot = Robot()
    robot.run(600, joints=edited(velocity=[], effort=[], name=["b", "x", "a"]))
    assert robot.reasons == []


def test_a_joint_that_jumps_is_trouble_at_once_and_for_its_max_age() -> None:
    robot = Robot()
    start = joints(robot.now_ns, 0).position  # the arm swings at sin(0.3); the jump is of joint a alone
    where = np.sin(0.3)
    # In 10 ms 3 times 2 rad/s allow 0.06 rad, and 0.05 rad more: 0.11 rad.
    robot.run(10, joints=edited(position=[-where, start[1], where + 0.105]))
    assert robot.reasons == []
    robot.run(10, joints=edited(position=[-where, start[1], where + 0.105 - 0.115]))
    (reason,) = robot.reasons
    for word in ("'a' jumped", f"from {where + 0.105:.3f} to {where - 0.01:.3f}", "in 0.010 s", "3 times", "of 2 "):
        assert word in reason, reason
    stay = edited(position=[-where, start[1], where - 0.01])
    robot.run(200, joints=stay)
    assert len(robot.reasons) == 1
    robot.run(10, joints=stay)
    assert robot.reasons == []
    assert robot.watch.invalid()["state"] == 1


def test_a_joint_without_limits_cannot_jump() -> None:
    robot = Robot()
    robot.run(10, joints=edited(position=[50.0, 0.0, np.sin(0.3)]))
    assert robot.reasons == []


def test_nothing_yet_is_trouble_of_every_stream() -> None:
    buffer = ObservationBuffer(ROBOT, 2)
    watch = InputWatch(ROBOT, buffer)
    reasons = [trouble.reason for trouble in watch.check(T0)]
    assert [reason.split("'")[1] for reason in reasons] == [TOP, WRIST, JOINTS]
    assert all("no message yet" in reason for reason in reasons)
    bad = compressed(lambda data: b"")(WRIST, T0)
    add(buffer, (TOP, top(T0, 0)), (WRIST, bad), (JOINTS, joints(T0, 0)))
    (trouble,) = watch.check(T0)
    assert "no message fit for the policy yet" in trouble.reason
    assert "empty" in trouble.reason


def test_stamps_in_the_future_are_trouble() -> None:
    robot = Robot()
    robot.run(300, top=lambda topic, t_ns: top(t_ns + 500 * MS, 0))
    (reason,) = robot.reasons
    assert f"'{TOP}' (top): stamped 0.500 s in the future" in reason


def test_each_message_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    check = watch.check_image

    def counting(message: Any, camera: Any) -> None:
        looked.append(stamp_ns(message))
        check(message, camera)

    monkeypatch.setattr(watch, "check_image", counting)
    robot = Robot()
    robot.run(300)
    robot.watch.check(robot.now_ns)
    assert len(looked) == 2 * 600 // 30
    assert sorted(set(looked)) == [T0 + ms * MS for ms in range(30, 601, 30)]


def test_a_clock_that_goes_back_is_followed() -> None:
    """What was seen before the jump is no measure for what comes after it."""
    robot = Robot()
    robot.run(3000)
    robot.ms = 100
    robot.run(30)
    assert robot.reasons == []  # all three have come again; the joints' jump in position is the clock's
    robot.run(270, top=silent)
    assert robot.reasons == []
    robot.run(60, top=silent)
    (reason,) = robot.reasons
    assert "no new message for 0.340 s" in reason
