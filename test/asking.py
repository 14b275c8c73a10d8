"""Asking a service of a node that has just come up: until its side has found the client too, an answer may be lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

AGAIN_S = 5.0


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
