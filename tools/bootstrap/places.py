"""Where an environment lives: each distribution that is asked for by name has folders of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """The folders of one environment under `root`; `suffix` ends their names and is empty for the default one."""

    root: Path
    suffix: str = ""

    @property
    def venv(self) -> Path:
        """The virtual environment."""
        return self.root / f".venv{self.suffix}"

    @property
    def stamps(self) -> Path:
        """What vouches for the steps whose result is in the environment."""
        return self.venv / ".setup"

    @property
    def build(self) -> Path:
        """Where colcon builds."""
        return self.root / f"build{self.suffix}"

    @property
    def install(self) -> Path:
        """Where colcon installs."""
        return self.root / f"install{self.suffix}"

    @property
    def log(self) -> Path:
        """Where colcon writes its logs."""
        return self.root / f"log{self.suffix}"

    @property
    def step_logs(self) -> Path:
        """What the steps' commands printed."""
        return self.root / ".setup" / f"logs{self.suffix}"
