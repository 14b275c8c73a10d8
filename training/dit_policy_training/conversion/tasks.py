"""What the robot was told at an instant: by the instruction topic, or by hand for a bag without one."""

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training.conversion.feeds import Feeds
from dit_policy_training.conversion.message import BagMessage
from dit_policy_training.conversion.options import ConvertConfig
from dit_policy_training.conversion.rows import SampleError


class Tasks:
    """The tasks of a bag; `notes` says what is odd about them."""

    def __init__(self, config: ConvertConfig, embodiment: Embodiment, feeds: Feeds):
        self.notes: list[str] = []
        self._topic = embodiment.instruction_topic
        self._by_hand = config.episodes.task.strip()
        self._told: list[tuple[int, str]] = []
        there = feeds.msgtype(self._topic) is not None
        if there and self._by_hand:
            self.notes.append(
                f"its own instructions on {self._topic} are used, not --episodes.task, which is for bags without any"
            )
        by = config.episodes.by
        # Annotations tell their tasks, and calls of a service may.
        needless = by == "annotations" or (not there and (by == "service" or (self._by_hand and by != "instruction")))
        if not needless:
            clock = feeds.clock("instruction", self._topic, "task", "as_of", None, "receive")
            feeds.connect(clock, self._add, measured=False)

    @property
    def hint(self) -> str:
        """What to do where there is none."""
        return ". For bags without instructions give the task by hand: --episodes.task='what the robot does'"

    def _add(self, stamp_ns: int, message: BagMessage) -> None:
        task = str(message.data).strip()
        if not task:
            raise SampleError(f"the instruction on {message.topic} at {_seconds(stamp_ns)} is empty")
        self._told.append((stamp_ns, task))

    def at(self, t_ns: int) -> str:
        """The task in force. Raises SampleError if there is none."""
        task = next((task for told_ns, task in reversed(self._told) if told_ns <= t_ns), self._by_hand)
        if not task:
            raise SampleError(f"no task at {_seconds(t_ns)}: nothing was received on {self._topic}{self.hint}")
        return task

    def forget(self, t_ns: int) -> None:
        """Forget what was replaced before t_ns."""
        while len(self._told) > 1 and self._told[1][0] <= t_ns:
            self._told.pop(0)


def _seconds(ns: int) -> str:
    return f"{ns / 1e9:.3f} s"
