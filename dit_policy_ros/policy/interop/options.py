"""What a conversion can be told, and what it tells."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from .fields import InteropError

# Options that are of use in one direction only.
_OF = {"native": ("clip", "embodiment"), "lerobot": ("sampler", "steps", "flat_names")}


@dataclass
class Options:
    """Choices of a conversion.

    clip: a local folder with CLIP's tokenizer (and its config.json, if at hand), instead of the name in the
    checkpoint. embodiment: the robot's description, which foreign checkpoints lack. sampler, steps: what an
    export to LeRobot samples with by default, instead of the checkpoint's choice. flat_names: write the tensor
    names of transformers 5.6 and later. overwrite: replace the target.
    """

    clip: str | None = None
    embodiment: Path | None = None
    sampler: str | None = None
    steps: int | None = None
    flat_names: bool = False
    overwrite: bool = False

    def check(self, to: str, target: Path) -> None:
        """Raises InteropError for options that a conversion to "native" or "lerobot" does not read."""
        others = [name for direction, names in _OF.items() if direction != to for name in names]
        if given := [
            entry for entry in fields(self) if entry.name in others and getattr(self, entry.name) != entry.default
        ]:
            names = ", ".join("--" + entry.name.replace("_", "-") for entry in given)
            raise InteropError(f"{names} is of no use with --to {to}: leave it out")
        if target.exists() and not self.overwrite:
            raise InteropError(f"{target} exists: name another folder, or say --overwrite")


@dataclass
class Summary:
    """What a conversion did. tensors: the number carried over; dropped: names of those left out."""

    source: str
    tensors: int
    dropped: list[str]
    fields: list[tuple[str, str, str]]
    notes: list[str] = field(default_factory=list)
