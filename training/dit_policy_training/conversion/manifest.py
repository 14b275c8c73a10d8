"""Which bags are done: OUTPUT.shards, with a finished part ("shard") for each bag and a record of what it is made from.

A shard lies there under its final name only when it is complete, so whatever ends a run, the next one can go on.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from dit_policy_training.conversion.bag_files import content_files
from dit_policy_training.conversion.settings import Settings

RECORD = "conversion.json"
KEY_DIGITS = 12  # of a shard's key in its folder's name
_PARTIAL = ".partial-"
_REFUSED = "refused"
_PARTS = "parts"


class ManifestError(ValueError):
    """A record of finished work that cannot be used; the message says which, and what to do."""


@dataclass(frozen=True)
class BagFile:
    """A file of a bag as it was found: equal ones hold equal bytes, for what is not done on purpose."""

    path: str  # absolute
    size: int  # bytes
    mtime_ns: int


def files_of(bag: Path) -> tuple[BagFile, ...]:
    """The files that the bag's fingerprint is of."""
    found = [(path.resolve(), path.stat()) for path in content_files(bag)]
    return tuple(BagFile(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found)


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: the folder, the bag and the settings that it was made from, and the sampler's account."""

    folder: Path
    key: str
    bag: str  # as given
    files: tuple[BagFile, ...]
    fingerprint: str
    settings: Settings
    frames: int
    episodes: int
    account: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises ManifestError if the folder has no such record, or one that another version wrote."""
        try:
            record = json.loads((folder / RECORD).read_text())
            record["files"] = tuple(BagFile(**file) for file in record["files"])
            record["settings"] = Settings.from_json(record["settings"])
            return cls(folder=folder, **record)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ManifestError(f"{folder / RECORD}: {error}; remove {folder} and convert again") from error

    def save(self) -> None:
        """Write the record into the shard's folder."""
        record = asdict(self)
        del record["folder"]
        write_json(self.folder / RECORD, record)


@dataclass(frozen=True)
class Refusal:
    """A bag that was left out, and why: in words, for whoever mends the converter, and as the sampler saw the bag."""

    bag: Path
    reason: str
    details: str = ""  # a traceback
    account: dict[str, Any] | None = None


def without_copies(outcomes: Iterable[ShardRecord | Refusal]) -> list[ShardRecord | Refusal]:
    """A bag of the same bytes as an earlier one is refused: twice the same data weighs double in training."""
    first: dict[str, str] = {}
    kept: list[ShardRecord | Refusal] = []
    for outcome in outcomes:
        if isinstance(outcome, ShardRecord) and first.setdefault(outcome.key, outcome.bag) != outcome.bag:
            reason = f"a copy of {first[outcome.key]}, byte for byte; remove one of them"
            kept.append(Refusal(Path(outcome.bag), reason))
        else:
            kept.append(outcome)
    return kept


@dataclass(frozen=True)
class Part:
    """What one `--shard=i/n` run was for: the bags of all runs, and its own."""

    number: int
    of: int
    bags: tuple[str, ...]  # of all n runs, sorted
    done: dict[str, str]  # of this run's: the shard's key by bag; the bag's older shards may lie beside it
    refused: dict[str, str]  # of this run's: reason by bag
    settings: Settings

    @classmethod
    def of_run(
        cls,
        number: int,
        of: int,
        bags: Sequence[Path],
        outcomes: Sequence[ShardRecord | Refusal],
        settings: Settings,
    ) -> Self:
        """`bags` of all runs, `outcomes` of this one's."""
        done = {one.bag: one.key for one in outcomes if isinstance(one, ShardRecord)}
        refused = {str(one.bag): one.reason for one in outcomes if isinstance(one, Refusal)}
        return cls(number, of, tuple(map(str, bags)), done, refused, settings)

    @property
    def own(self) -> tuple[str, ...]:
        """This run's bags."""
        return self.bags[self.number - 1 :: self.of]


class ShardsFolder:
    """OUTPUT.shards."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def of(cls, output: Path) -> Self:
        """The one that belongs to a dataset's folder."""
        return cls(output.with_name(f"{output.name}.shards"))

    def records(self) -> list[ShardRecord]:
        """Of all finished shards, by name. One that cannot be read counts as not done."""
        found = []
        for folder in sorted(self.path.glob(f"[!.]*/{RECORD}")):
            try:
                found.append(ShardRecord.load(folder.parent))
            except ManifestError:
                continue
        return found

    def find(self, key: str) -> ShardRecord | None:
        """The finished shard of that key."""
        for folder in sorted(self.path.glob(f"*-{key[:KEY_DIGITS]}")):
            try:
                record = ShardRecord.load(folder)
            except ManifestError:
                shutil.rmtree(folder)  # half a shard, or another version's: its place is needed
                continue
            if record.key == key:
                return record
        return None

    def new_folder(self, part: str) -> Path:
        """A name for a shard that is not yet complete, by the part of the work that it belongs to (see `clear`)."""
        return self.path / f"{_PARTIAL}{part}-{uuid.uuid4().hex[:KEY_DIGITS]}"

    def clear(self, part: str) -> None:
        """Remove what killed runs of this part left half done; the part "all" has every other's as well."""
        for folder in self.path.glob(f"{_PARTIAL}{'' if part == 'all' else part + '-'}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, record: ShardRecord) -> ShardRecord:
        """Give a complete shard its record and its final name. If another process was first, its shard is taken."""
        final = self.path / f"{_name(Path(record.bag))}-{record.key[:KEY_DIGITS]}"
        record.save()
        flush(record.folder)
        try:
            record.folder.rename(final)
        except OSError:
            if (first := self.find(record.key)) is None:
                raise
            shutil.rmtree(record.folder)
            return first
        flush_name(final)
        return replace(record, folder=final)

    def remove_all_but(self, needed: Iterable[ShardRecord], bags: Sequence[Path]) -> int:
        """Remove shards that are not needed, and the refusals of other bags; returns how many shards."""
        kept = {record.folder.name for record in needed}
        unneeded = [folder for folder in self._shards() if folder.name not in kept]
        for folder in unneeded:
            shutil.rmtree(folder)
        names = {_refusal_name(bag) for bag in bags}
        for path in (self.path / _REFUSED).glob("*.json"):
            if path.name not in names:
                path.unlink()
        shutil.rmtree(self.path / _PARTS, ignore_errors=True)
        return len(unneeded)

    def _shards(self) -> Iterator[Path]:
        yield from (path for path in sorted(self.path.glob(f"[!.]*-{'[0-9a-f]' * KEY_DIGITS}")) if path.is_dir())

    def refuse(self, refusal: Refusal) -> None:
        """Leave word of a refused bag; it is tried again in every run."""
        (self.path / _REFUSED).mkdir(exist_ok=True)
        record = {"bag": str(refusal.bag), "reason": refusal.reason, "details": refusal.details}
        write_json(self.path / _REFUSED / _refusal_name(refusal.bag), record)

    def accept(self, bag: Path) -> None:
        """A bag that may have been refused earlier is done."""
        (self.path / _REFUSED / _refusal_name(bag)).unlink(missing_ok=True)

    def save_part(self, part: Part) -> None:
        """Leave word that a `--shard=i/n` run is through."""
        (self.path / _PARTS).mkdir(exist_ok=True)
        write_json(self.path / _PARTS / f"{part.number}-of-{part.of}.json", asdict(part))

    def parts(self) -> list[Part]:
        """Of the `--shard` runs that are through. Raises ManifestError if one's record is damaged."""
        found = []
        for path in sorted((self.path / _PARTS).glob("*.json")):
            try:
                record = json.loads(path.read_text())
                record["bags"] = tuple(record["bags"])
                record["settings"] = Settings.from_json(record["settings"])
                found.append(Part(**record))
            except (ValueError, TypeError, KeyError) as error:
                raise ManifestError(f"{path}: {error}; remove it and run its --shard again") from error
        return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is there complete or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=False) + "\n")
    partial.replace(path)


def flush(folder: Path) -> None:
    """Bring a folder's files to the disk: after a power cut none may be there by name alone."""
    for path in [folder, *folder.rglob("*")]:
        _sync(path)


def flush_name(path: Path) -> None:
    """Bring the name of a file or folder to the disk."""
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refusal_name(bag: Path) -> str:
    return f"{_name(bag)}-{hashlib.sha256(str(bag.resolve()).encode()).hexdigest()[:KEY_DIGITS]}.json"


def _name(bag: Path) -> str:
    return bag.resolve().name.lstrip(".") or "bag"
