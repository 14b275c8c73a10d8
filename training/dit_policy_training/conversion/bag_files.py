"""Which files a recording is made of."""

import glob
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml
from backports import zstd

from dit_policy_training.conversion.message import BagError

STORAGE_SUFFIXES = (".mcap", ".db3")
_METADATA = "metadata.yaml"


@dataclass
class BagFiles:
    """The storage files of a recording, in order; what metadata.yaml counts by topic, None if it does not tell."""

    paths: list[Path]
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] | None = None
    distro: str | None = None


def storage_kind(path: Path) -> str | None:
    """`.mcap` or `.db3`, also of a file that was compressed as a whole (`.mcap.zstd`); None for other files."""
    suffix = path.with_suffix("").suffix if path.suffix in (".zstd", ".zst") else path.suffix
    return suffix if suffix in STORAGE_SUFFIXES else None


def find_bags(pattern: str) -> list[Path]:
    """The bags that a folder, a file or a glob pattern means, sorted by path.

    One bag is a folder with a metadata.yaml, or with files named after it as rosbag2 does (`run/run_0.mcap`), or else
    an .mcap or .db3 file (as it is or .zstd); other folders are searched. Raises BagError if there is none.
    """
    paths = [Path(found) for found in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (Path.glob needs a root)
    bags = sorted({bag for path in paths for bag in _bags_under(path)})
    if not bags:
        raise BagError(f"{pattern}: no bag there; expected folders with a metadata.yaml, or .mcap or .db3 files")
    return bags


def _bags_under(path: Path) -> Iterator[Path]:
    if path.is_dir():
        if (path / _METADATA).exists() or _is_unclosed_bag(path):
            yield path
        else:
            for child in path.iterdir():
                yield from _bags_under(child)
    elif storage_kind(path):
        yield path


def _is_unclosed_bag(folder: Path) -> bool:
    # metadata.yaml is written when the recording ends.
    return any(storage_kind(child) and child.name.startswith(f"{folder.name}_0.") for child in folder.iterdir())


def fingerprint(bag: Path) -> str:
    """sha256 (64 hex digits) over the names, sizes and bytes of a bag's files."""
    digest = hashlib.sha256()
    for path in content_files(bag):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        _hash_into(digest, path)
    return digest.hexdigest()


def content_files(bag: Path) -> list[Path]:
    """What a recording's content depends on: its storage files, what sqlite had not moved into them, metadata.yaml."""
    there = sorted(bag.iterdir()) if bag.is_dir() else [bag, bag.with_name(f"{bag.name}-wal")]
    return [path for path in there if path.is_file() and (path.name == _METADATA or storage_kind(_without_log(path)))]


def _without_log(path: Path) -> Path:
    return path.with_name(path.name.removesuffix("-wal"))


def _hash_into(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def bag_files(bag: Path) -> BagFiles:
    """The files of a bag, by its metadata.yaml where there is one. Raises BagError if one is missing."""
    if not bag.exists():
        raise BagError(f"{bag}: is not there")
    if not bag.is_dir():
        return BagFiles([bag])
    metadata = bag / _METADATA
    there = sorted((path for path in bag.iterdir() if storage_kind(path) and path.is_file()), key=_natural)
    if metadata.exists():
        try:
            return _listed(bag, there, yaml.safe_load(metadata.read_text(encoding="utf-8")))
        except BagError:
            raise
        except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            note = f"metadata.yaml is damaged ({_line(error)}): the folder's files are read without it"
    else:
        note = "no metadata.yaml, which a recorder writes when it ends: the folder's files are read without it"
    if not there:
        raise BagError(f"{bag.name}: {note}, but there is none")
    paths, notes = _without_copies(there)
    return BagFiles(paths, [note, *notes])


def _listed(bag: Path, there: list[Path], document: Any) -> BagFiles:
    information = document["rosbag2_bagfile_information"]
    names = [PurePath(str(listed)).name for listed in information["relative_file_paths"]]
    if missing := [name for name in dict.fromkeys(names) if not (bag / name).exists()]:
        raise BagError(
            f"{bag.name}: metadata.yaml lists {', '.join(missing)}, which is not there; copy it, or remove "
            "metadata.yaml to use the files that are"
        )
    distro = information.get("ros_distro")
    files = BagFiles([bag / name for name in dict.fromkeys(names)], distro=str(distro) if distro else None)
    if others := [path.name for path in there if path.name not in names]:
        files.notes.append(f"{', '.join(others)}: left out, as metadata.yaml does not list it; remove what is a copy")
    counts: dict[str, int] = {}
    for entry in information["topics_with_message_count"]:
        name = str(entry["topic_metadata"]["name"])
        counts[name] = counts.get(name, 0) + int(entry["message_count"])
    files.counts = counts
    return files


def _without_copies(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    kept: dict[tuple[int, str], Path] = {}
    notes = []
    paths = list(paths)
    sizes = [path.stat().st_size for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        digest = hashlib.sha256()
        if sizes.count(size) > 1:
            _hash_into(digest, path)
            key = (size, digest.hexdigest())
        else:
            key = (size, path.name)
        first = kept.setdefault(key, path)
        if first != path:
            notes.append(f"{path.name}: left out, since it is a copy of {first.name}; remove it")
    return list(kept.values()), notes


def decompressed(path: Path, folder: Path) -> Path:
    """The file itself, or what a file compressed as a whole holds, written into `folder`. Raises BagError."""
    if path.suffix not in (".zstd", ".zst"):
        return path
    target = folder / path.stem
    try:
        with zstd.open(path, "rb") as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file)
    except (zstd.ZstdError, EOFError) as error:
        reason = f"{path.name}: cannot be decompressed: {error}; copy it again from where it was recorded"
        raise BagError(reason) from error
    except OSError as error:
        raise BagError(f"{path.name}: cannot be decompressed into {folder}: {error}") from error
    return target


def _natural(path: Path) -> tuple[int, str]:
    """run_2 before run_10."""
    number = path.name.split(".")[0].rpartition("_")[2]
    return (int(number) if number.isdigit() else 0, path.name)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
