"""The conductor set in motion: what goes to the arm, and in which order, as seen by an arm that notes it."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy")

from rclpy.logging import get_logger
from test_conductor import EMBODIMENT
from test_conductor import Arm as Conducted

from dit_policy_ros.nodes.motion import Motion
from dit_policy_ros.runtime.decisions import Settings
from dit_policy_ros.runtime.pipeline import Sampled


class Arm:
    """Notes what it is asked for."""

    watch_foreign_commands = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.flushed = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.asked.append(name) or []

    def flush(self, timeout: float) -> bool:
        self.asked.append("flush")
        self.flushed.set()
        return True


class Moved:
    """A motion of a conductor with its own time and no beat: `tick` is the test's."""

    def __init__(self) -> None:
        self.conducted = Conducted()
        self.settings: Settings = self.conducted.settings
        self.arm = Arm()
        self.concluded: list[Any] = []
        self.heard = threading.Event()
        session: Any = SimpleNamespace(
            conductor=self.conducted.conductor,
            embodiment=EMBODIMENT,
            apply=lambda _: None,
            settings=lambda _: self.settings,
        )
        self.parameters: Any = SimpleNamespace(flag=lambda _: False, number=lambda _: 1.0)
        self.motion = Motion(
            session,
            self.arm,
            [],
            self.parameters,
            tell=self._conclude,
            on_fault=lambda: None,
            now_ns=lambda: self.conducted.now_ns,
            log=get_logger("test_motion"),
        )

    def _conclude(self, outcome: Any, now_ns: int) -> None:
        self.concluded.append(outcome)
        self.heard.set()


@pytest.fixture
def moved() -> Any:
    made = Moved()
    yield made
    made.arm.flushed.set()
    made.motion.worker.close(20)


def test_a_dry_run_begins_when_the_parameter_is_accepted(moved: Moved) -> None:
    request = moved.conducted.request()
    moved.settings = replace(moved.settings, dry_run=True)
    moved.motion.apply(moved.parameters)
    sampled: Sampled = moved.conducted.sampled(request)
    moved.motion.worker.submit(lambda: sampled)
    assert moved.heard.wait(20)
    assert moved.concluded[-1].decision.accepted
    assert "send" not in moved.arm.asked


def test_what_is_left_of_a_stop_is_sent_before_the_inference_is_waited_for(moved: Moved) -> None:
    sampled = moved.conducted.sampled(moved.conducted.request())
    moved.motion.stop()

    begun = threading.Event()

    def slow() -> Sampled:
        begun.set()
        moved.arm.flushed.wait(20)
        return sampled

    moved.motion.worker.submit(slow)
    assert begun.wait(20)
    moved.motion.close()
    assert moved.arm.asked[-2:] == ["flush", "close"]
