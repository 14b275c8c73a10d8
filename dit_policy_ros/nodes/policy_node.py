"""Entry point of the policy node: `ros2 run dit_policy_ros policy_node`. The node itself is in lifecycle.py."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

_SWITCH_S = 0.001
_M_MMAP_THRESHOLD, _PICTURE_BYTES = -3, 512 * 1024  # of malloc.h


def _give_pictures_back() -> None:
    """Have the C library return every picture's memory when it is freed.

    By default it learns from the first one freed to keep such blocks, and thirty pictures a second, coming and going
    between the threads, then tear holes into the heap: it grew by 10 MB a minute.
    """
    with suppress(AttributeError):  # of a C library that is not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _PICTURE_BYTES)


def main(args: Sequence[str] | None = None) -> None:
    """Run the node until SIGINT or SIGTERM; exits with 0 then, with 1 if it cannot start or cannot end cleanly."""
    # Importing torch takes seconds, in which nothing moves yet: a signal then is the end, without a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    # A thread that computes in Python may hold the others up by so much; the default of 5 ms is half a beat.
    sys.setswitchinterval(_SWITCH_S)
    _give_pictures_back()

    from rclpy.exceptions import ParameterException
    from rclpy.node import Node

    from dit_policy_ros.nodes.lifecycle import PolicyNode
    from dit_policy_ros.nodes.spin import run_node

    def finish(node: Node) -> None:
        assert isinstance(node, PolicyNode)
        node.finish()

    try:
        run_node(PolicyNode, finish, args)
    except (ParameterException, ValueError) as error:  # of the parameters given at the start
        sys.exit(f"policy_node: {error}")
    if any(thread.name == "inference" for thread in threading.enumerate()):
        print("policy_node: the inference has not ended; the process is ended without it", file=sys.stderr, flush=True)
        os._exit(1)  # Python would wait for the thread


if __name__ == "__main__":
    main()
