"""A ROS domain of one's own, so that tests and demonstrations running side by side never hear each other.

A domain is claimed by binding an abstract Unix socket named after it. Such a name lives exactly where DDS traffic on
the local host does, in the network namespace, whoever the user and whatever the container's file system; and the kernel
releases it with the process, however that ends, so that no stale claim is ever left behind.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

# DDS derives its ports from the domain: 7400 + 250 * domain. Up to 101 they stay below Linux's ephemeral ports (32768).
# 0 is left to those who chose no domain.
DOMAINS = range(1, 102)


@contextmanager
def claimed_domain() -> Iterator[int]:
    """Claim a free ROS_DOMAIN_ID until the block ends; RuntimeError if all of them are taken.

    Only those who claim in this way are avoided. The search starts at a place that differs between processes, which
    most likely keeps away from a domain that somebody chose by hand.
    """
    first = os.getpid() % len(DOMAINS)
    for domain in (*DOMAINS[first:], *DOMAINS[:first]):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
            try:
                claim.bind(f"\0dit_policy_ros/domain/{domain}")
            except OSError:
                continue  # another process has it
            yield domain
            return
    raise RuntimeError(
        f"no free ROS_DOMAIN_ID: all of {DOMAINS[0]} to {DOMAINS[-1]} are claimed by running tests or demonstrations. "
        "End some of them."
    )


def local_environment(domain: int) -> dict[str, str]:
    """The variables that keep a process, and those it starts, in `domain` and on this machine."""
    return {"ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
