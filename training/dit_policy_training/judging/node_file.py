"""The policy node's parameter file: some values changed, every comment and every other line as it was."""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

NODE = "dit_policy"
Value = int | float | str


def write_values(source: Path, values: Mapping[str, Value], target: Path | None = None) -> list[str]:
    """Set the node's parameters in a file, or in a copy of it; what has changed, a line each.

    The file is replaced at once. Raises ValueError for one that is no parameter file of the node, OSError.
    """
    text = source.read_text(encoding="utf-8")
    new = with_values(text, values, str(source))
    before, after = (_parameters_of(yaml.safe_load(each)) for each in (text, new))
    if after != before | dict(values) or not _same_elsewhere(text, new, set(values)):
        raise ValueError(
            f"{source} is of a form in which values cannot be changed one by one; set them by hand: {values}"
        )
    path = target or source
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(new, encoding="utf-8")
    partial.chmod(stat.S_IMODE(source.stat().st_mode))
    partial.replace(path)
    return [
        f"{name}: {before[name]!r} -> {new!r}" if name in before else f"{name}: {new!r}" for name, new in values.items()
    ]


def with_values(text: str, values: Mapping[str, Value], source: str = "the file") -> str:
    """The text with the node's parameters set. Raises ValueError where it has none, or several sets of them."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    found = list(_sections(root, ()))
    if len(found) != 1:
        what = "no parameters" if not found else f"{len(found)} sets of parameters"
        raise ValueError(
            f"{source} has {what} of a node {NODE}; expected one, as in config/dit_policy.yaml: a copy of that will do"
        )
    section = found[0]
    places = {key.value: value for key, value in section.value}
    edits = [(places[name], _written(value)) for name, value in values.items() if name in places]
    for node, written in sorted(edits, key=lambda edit: -edit[0].start_mark.index):
        text = _replaced(text, node.start_mark.index, node.end_mark.index, written)
    missing = {name: value for name, value in values.items() if name not in places}
    return _appended(text, section, missing) if missing else text


def _sections(node: yaml.Node | None, name: tuple[str, ...]) -> Iterator[yaml.MappingNode]:
    """Every `ros__parameters` of the node, in whatever namespace."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if key.value == "ros__parameters" and name and name[-1].rpartition("/")[2] == NODE:
            if isinstance(value, yaml.MappingNode):
                yield value
        elif key.value != "ros__parameters":
            yield from _sections(value, (*name, str(key.value)))


def _parameters_of(document: object) -> dict[str, object]:
    """The node's parameters in a parsed file."""
    if not isinstance(document, dict):
        return {}
    for name, value in document.items():
        if isinstance(value, dict):
            if str(name).rpartition("/")[2] == NODE and isinstance(value.get("ros__parameters"), dict):
                return dict(value["ros__parameters"])
            if name != "ros__parameters" and (inner := _parameters_of(value)):
                return inner
    return {}


def _same_elsewhere(text: str, new: str, names: set[str]) -> bool:
    """Whether only lines of these names differ."""
    old_lines, new_lines = text.splitlines(), new.splitlines()
    added = [line for line in new_lines if line.split(":")[0].strip() not in names]
    kept = [line for line in old_lines if line.split(":")[0].strip() not in names]
    return added == kept


def _written(value: Value) -> str:
    return yaml.safe_dump(value).removesuffix("\n").removesuffix("\n...")


def _replaced(text: str, start: int, end: int, written: str) -> str:
    """The value between start and end exchanged; a comment behind it keeps its column if there is room."""
    rest = text[end:]
    spaces = len(rest) - len(rest.lstrip(" "))
    if spaces and rest.lstrip(" ").startswith("#"):
        room = max(spaces + (end - start) - len(written), 1)
        rest = " " * room + rest.lstrip(" ")
    return text[:start] + written + rest


def _appended(text: str, section: yaml.MappingNode, values: Mapping[str, Value]) -> str:
    """Values that were not there, before the section's first."""
    first = section.value[0][0].start_mark
    if section.flow_style:
        new = "".join(f"{name}: {_written(value)}, " for name, value in values.items())
        return text[: first.index] + new + text[first.index :]
    line = text.rfind("\n", 0, first.index) + 1
    new = "".join(f"{' ' * first.column}{name}: {_written(value)}\n" for name, value in values.items())
    return text[:line] + new + text[line:]
