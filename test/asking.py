"""Asking a service of a node that has just come up: until its side has found the client too, an answer may be lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lifecycle_msgs.msg import State

AGAIN_S = 5.0
REACHED = {"configure": "inactive", "activate": "active", "deactivate": "inactive", "cleanup": "unconfigured"}


class Unanswered(AssertionError):
    """No answer came in time."""


def ask(client: Any, request: Any, timeout: float, once: bool = False, check: Callable[[], None] = lambda: None) -> Any:
    """The service's answer, asking again every few seconds unless `once`; `check` may raise while it is waited for."""
    deadline = time.monotonic() + timeout
    futures, asked = [client.call_async(request)], time.monotonic()
    while time.monotonic() < deadline:
        check()
        for future in futures:
            if future.done():
                return future.result()
        if not once and time.monotonic() - asked > AGAIN_S:
            futures.append(client.call_async(request))
            asked = time.monotonic()
        time.sleep(0.01)
    raise Unanswered(f"within {timeout} s: service {client.srv_name} answers")


def label(state: State) -> str:
    """A lifecycle state's name; Jazzy gives the first two none."""
    names = {State.PRIMARY_STATE_UNCONFIGURED: "unconfigured", State.PRIMARY_STATE_INACTIVE: "inactive"}
    return names.get(state.id, str(state.label))


def transition(name: str, change: Callable[[], bool], state: Callable[[], str]) -> bool:
    """Whether the node made the transition: `change` asks for it, and raises Unanswered, `state` asks for its state.

    It must not be asked for twice, unless the node stands where it stood: then the request itself was lost.
    """
    before = state()
    try:
        return change()
    except Unanswered:
        now = state()
        return change() if now == before else now == REACHED[name]
