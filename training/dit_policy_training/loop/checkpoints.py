"""Which checkpoints of a run are kept: the last, the best, and some older ones."""

import shutil
from pathlib import Path

from dit_policy_ros.policy.checkpoint import clear_interrupted

LAST, BEST = "last", "best"


class Checkpoints:
    """The folder `checkpoints` of a run: a folder a step, and the links `last` and `best`."""

    def __init__(self, output_dir: Path, keep: int = -1):
        """keep: how many older ones stay beside the best and the last; -1: all."""
        self.folder = output_dir / "checkpoints"
        self._keep = keep

    def place(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.folder / f"{step:06d}"

    def steps(self) -> list[int]:
        """The steps that have one, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit())

    def linked(self, name: str) -> int | None:
        """The step that a link leads to."""
        link = self.folder / name
        return int(link.resolve().name) if link.is_symlink() and link.exists() else None

    def link(self, name: str, step: int) -> None:
        """Make a link lead to a step; it leads somewhere at all times."""
        new = self.folder / f".{name}"
        new.unlink(missing_ok=True)
        new.symlink_to(self.place(step).name)
        new.replace(self.folder / name)

    def thin(self) -> None:
        """Remove the oldest of those that are neither best nor last."""
        if self._keep < 0:
            return
        kept = {self.linked(LAST), self.linked(BEST)}
        older = [step for step in self.steps() if step not in kept]
        for step in older[: max(len(older) - self._keep, 0)]:
            self._remove(step)

    def clear(self) -> list[Path]:
        """Remove what a killed run left half-written; returns it."""
        return clear_interrupted(self.folder) if self.folder.is_dir() else []

    def cut(self, step: int, best: int | None = None) -> None:
        """Remove the checkpoints after a step, 0 for all, and set the links: a killed run may not have come to it."""
        for later in self.steps():
            if later > step:
                self._remove(later)
        for name, to in ((LAST, step), (BEST, best)):
            if to is not None and self.place(to).exists():
                self.link(name, to)
            link = self.folder / name
            if link.is_symlink() and not link.exists():
                link.unlink()

    def _remove(self, step: int) -> None:
        # Renamed first: a folder that is half gone must not look like a checkpoint.
        gone = self.folder / f".{step:06d}.partial"
        shutil.rmtree(gone, ignore_errors=True)
        self.place(step).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
