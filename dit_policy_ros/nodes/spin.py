"""Spinning a node until SIGINT or SIGTERM, then letting it finish properly: exit status 0 and no traceback."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Sequence

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

_WAKE_UP_S = 0.05  # how long a signal may go unnoticed while nothing else happens


def run_node(make_node: Callable[[], Node], finish: Callable[[Node], None], args: Sequence[str] | None = None) -> None:
    """Make a node, spin it in one thread until a signal asks to stop, call `finish(node)` while DDS is still up.

    rclpy's own handlers shut the context down at once, and a stop trajectory could no longer be published; so the
    signals are ours, and a second one during `finish` changes nothing.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
    executor = SingleThreadedExecutor()
    node = make_node()
    executor.add_node(node)
    try:
        while not stop.is_set() and rclpy.ok():
            try:
                executor.spin_once(timeout_sec=_WAKE_UP_S)
            except rclpy_implementation.RCLError as error:
                # Asked for a transition that the state does not have, Jazzy's rclpy raises where Kilted's answers no.
                node.get_logger().error(f"a request could not be served: {error}")
    finally:
        finish(node)
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown()
        gc.freeze()  # else the interpreter searches all of torch for garbage on its way out, for seconds
