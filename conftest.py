"""What every test run gets: a ROS domain of its own on this machine, and no network."""

import os
from contextlib import ExitStack

import pytest

from dit_policy_ros.nodes.domain import claimed_domain, local_environment


def pytest_configure(config: pytest.Config) -> None:
    """Claim the domain before any test module is imported, and keep it until the run ends."""
    claim = ExitStack()
    config.add_cleanup(claim.close)
    os.environ.update(local_environment(claim.enter_context(claimed_domain())))
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
