"""What a bag's part of a dataset depends on besides the bag: as a key, and as words for what has changed."""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import draccus

from dit_policy_ros.embodiment import Embodiment
from dit_policy_training.conversion.layout import at_fps
from dit_policy_training.conversion.options import ConvertConfig

CONVERTER_VERSION = 1  # to be raised by whoever changes what the converter makes of a bag
RESULT = ("time", "episodes", "vectors", "depth", "controller", "video", "recover")  # options that change the result


@dataclass(frozen=True)
class Settings:
    """The same settings make the same data of the same bag."""

    embodiment: str  # YAML, with the dataset's fps
    options: dict[str, Any]  # JSON types
    annotations: str  # sha256 of the annotation file, or empty
    converter: int
    lerobot: str

    @classmethod
    def of(cls, config: ConvertConfig, embodiment: Embodiment) -> Self:
        """`embodiment` with the dataset's fps (`robot_of`)."""
        encoded = draccus.encode(config)
        del encoded["episodes"]["annotations"]  # not where it lies counts, but what it says
        return cls(
            embodiment=embodiment.to_yaml(),
            options={name: encoded[name] for name in RESULT},
            annotations=_sha256(config.episodes.annotations),
            converter=CONVERTER_VERSION,
            lerobot=version("lerobot"),
        )

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Of what `as_json` gave."""
        return cls(**record)

    def as_json(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self)

    def key(self, fingerprint: str) -> str:
        """64 hex digits that stand for these settings and the bag of that fingerprint."""
        text = json.dumps([fingerprint, self.as_json()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, earlier: "Settings") -> list[str]:
        """What differs, each as "option: earlier value -> present value"."""
        here, there = _flat(self.options), _flat(earlier.options)
        changes = [
            f"{name}: {there.get(name, 'not set')} -> {here.get(name, 'not set')}"
            for name in sorted(here.keys() | there.keys())
            if here.get(name) != there.get(name)
        ]
        if self.embodiment != earlier.embodiment:
            changes += [f"embodiment: {line}" for line in _embodiment_differences(self.embodiment, earlier.embodiment)]
        if self.annotations != earlier.annotations:
            changes.append("the annotation file")
        if self.converter != earlier.converter:
            changes.append(f"the converter: {earlier.converter} -> {self.converter}")
        if self.lerobot != earlier.lerobot:
            changes.append(f"lerobot: {earlier.lerobot} -> {self.lerobot}")
        return changes


def robot_of(config: ConvertConfig) -> Embodiment:
    """The embodiment with the dataset's fps. Raises EmbodimentError if the file is wrong."""
    return at_fps(Embodiment.load(config.embodiment), config.fps)


def _sha256(path: Path | None) -> str:
    return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    named = [_flat(inner, f"{prefix}.{name}" if prefix else str(name)) for name, inner in value.items()]
    return {name: inner for part in named for name, inner in part.items()}


def _embodiment_differences(here: str, there: str) -> list[str]:
    now, before = (Embodiment.from_yaml(text, "embodiment") for text in (here, there))
    return now.differences(before) or ["written otherwise"]
