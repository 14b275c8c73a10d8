"""The instruction in force, wherever it comes from: topic, service, parameter or action."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dit_policy_msgs.srv import SetInstruction
from rclpy.node import Node
from rclpy.subscription import Subscription
from std_msgs.msg import String

from dit_policy_ros.nodes.qos import LATCHED


class Instructions:
    """Takes instructions from the topic and ~/set_instruction, and through `accept` from elsewhere.

    None is taken before `open` and after `close`. `generation` grows with each one that differs from the one before.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._log = node.get_logger()
        self._subscription: Subscription | None = None
        self._follow: Callable[[str], None] | None = None
        self._tasks: Sequence[str] = ()
        self.text = ""
        self.generation = 0
        node.create_service(SetInstruction, "~/set_instruction", self._serve)

    @property
    def known(self) -> bool:
        """Whether the policy was trained on exactly this instruction."""
        return self.text in self._tasks

    def open(self, topic: str, tasks: Sequence[str], follow: Callable[[str], None]) -> None:
        """Begin to take instructions; `tasks`: those of the training; `follow(text)` gets each one that is new."""
        self._tasks = tuple(tasks)
        self._follow = follow
        self._subscription = self._node.create_subscription(String, topic, self._on_message, LATCHED)

    def close(self) -> None:
        """Take no more, and forget the one in force."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
        self._subscription, self._follow, self._tasks, self.text = None, None, (), ""

    def accept(self, text: str) -> str | None:
        """Take an instruction, or say in a sentence why not."""
        instruction = text.strip()
        if not instruction:
            return self.refusal_of_nothing()
        if self._follow is None:
            return "no instruction can be taken before the node is configured"
        if instruction == self.text:
            return None
        self.text = instruction
        self.generation += 1
        if not self.known:
            tasks = ", ".join(f"'{task}'" for task in self._tasks)
            self._log.warning(
                f"the policy was not trained on '{instruction}', only on {tasks}; it runs anyway",
                throttle_duration_sec=1.0,  # a thousand instructions a second must not fill the disk
            )
        self._follow(instruction)
        return None

    def forget(self) -> None:
        """There is none in force any more; that the arm rests is for the caller to see to."""
        self.text = ""
        self.generation += 1

    def refusal_of_nothing(self) -> str:
        """Why an empty instruction is none, in a sentence."""
        kept = f"'{self.text}' stays in force" if self.text else "there is none in force"
        return f"an empty instruction is refused; {kept}. To stop the arm, deactivate the node"

    def _on_message(self, message: String) -> None:
        reason = self.accept(message.data)
        if reason is not None:
            self._log.error(reason, throttle_duration_sec=1.0)

    def _serve(self, request: SetInstruction.Request, response: SetInstruction.Response) -> SetInstruction.Response:
        reason = self.accept(request.instruction)
        response.success = reason is None
        response.message = reason or f"instruction: {self.text}"
        return response
