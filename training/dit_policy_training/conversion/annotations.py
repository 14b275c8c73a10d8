"""A file that says where episodes are: CSV with the header `bag,start,end,task`, or YAML, a list of such mappings.

`bag` is the bag's name (its folder's or file's, with or without the suffix) or the end of its path; times in s from the
bag's first message. Read strictly, and every mistake is told with its line.
"""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml

from dit_policy_training.conversion.options import OptionError

COLUMNS = ("bag", "start", "end", "task")


@dataclass(frozen=True)
class Annotation:
    """An episode: from `start` to `end`, s; `where`: its file and line."""

    bag: str
    start: float
    end: float
    task: str
    where: str

    def is_of(self, bag: Path) -> bool:
        """Whether it speaks of this bag."""
        named = Path(self.bag)
        ends = (bag.parts[-len(named.parts) :], bag.with_suffix("").parts[-len(named.parts) :])
        return bool(named.parts) and named.parts in ends


def read_annotations(path: Path) -> list[Annotation]:
    """All annotations of a file, by its suffix. Raises OptionError listing every mistake with its line."""
    readers = {".csv": _read_csv, ".yaml": _read_yaml, ".yml": _read_yaml}
    if path.suffix.lower() not in readers:
        raise OptionError(f"--episodes.annotations={path}: expected a file called .csv, .yaml or .yml")
    problems: list[str] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(readers[path.suffix.lower()](text, problems))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, csv.Error) as error:
        raise OptionError(f"--episodes.annotations={path}: cannot be read: {error}") from error
    annotations = [read for line, row in rows if (read := _annotation(path, line, row, problems)) is not None]
    _complain_of_overlaps(annotations, problems)
    if not annotations and not problems:
        problems.append("it names no episode")
    if problems:
        raise OptionError(f"--episodes.annotations={path}: " + "".join(f"\n  {problem}" for problem in problems))
    return annotations


_Row = tuple[int, dict[str, str]]


def _read_csv(text: str, problems: list[str]) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text), strict=True)
    header = [name.strip() for name in next(reader, [])]
    if header != list(COLUMNS):
        problems.append(f"line 1: found '{','.join(header)}', expected the header '{','.join(COLUMNS)}'")
        return
    for values in reader:
        if not values:
            continue
        if len(values) != len(COLUMNS):
            expected = "a task with commas stands in quotes"
            problems.append(f"line {reader.line_num}: {len(values)} values, expected {len(COLUMNS)}; {expected}")
        else:
            yield reader.line_num, dict(zip(COLUMNS, values, strict=True))


def _read_yaml(text: str, problems: list[str]) -> Iterator[_Row]:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.SequenceNode):
        problems.append("line 1: expected a list, each entry with bag, start, end and task")
        return
    for node in root.value:
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode):
            problems.append(f"line {line}: expected bag, start, end and task")
            continue
        pairs = [(key.value, value) for key, value in node.value]
        keys = [key for key, _ in pairs]
        if sorted(map(str, keys)) != sorted(COLUMNS):
            problems.append(
                f"line {line}: found {', '.join(map(str, keys))}, expected each of {', '.join(COLUMNS)} once"
            )
        elif odd := [key for key, value in pairs if not isinstance(value, yaml.ScalarNode)]:
            problems.append(f"line {line}: {odd[0]} is a list or mapping, expected one value")
        else:
            yield line, {key: value.value for key, value in pairs}


def _annotation(path: Path, line: int, row: dict[str, str], problems: list[str]) -> Annotation | None:
    found = len(problems)
    start, end = (_number(line, key, row[key], problems) for key in ("start", "end"))
    bag, task = row["bag"].strip(), row["task"].strip()
    for key, text in (("bag", bag), ("task", task)):
        if not text:
            problems.append(f"line {line}: {key} is empty")
    if len(problems) == found and not 0 <= start < end:
        problems.append(f"line {line}: from {start} to {end} s, expected 0 <= start < end")
    return Annotation(bag, start, end, task, f"{path.name}, line {line}") if len(problems) == found else None


def _number(line: int, key: str, text: str, problems: list[str]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        problems.append(f"line {line}: {key} is '{text}', expected a number of seconds")
    return value


def _complain_of_overlaps(annotations: list[Annotation], problems: list[str]) -> None:
    ordered = sorted(annotations, key=lambda each: (each.bag, each.start))
    for one, other in pairwise(ordered):
        if one.bag == other.bag and other.start < one.end:
            problems.append(f"{other.where} begins at {other.start} s, before the end of {one.where}, {one.end} s")
