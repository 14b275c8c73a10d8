"""The policy node's parameter file: some values changed, every comment and every other line as it was."""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

NODE = "dit_policy"
Value = int | float | str


def write_values(source: Path, values: Mapping[str, Value], target: Path | None = None) -> list[str]:
    """Set the node's parameters in a file, or in a copy of it; what has changed, a line each.

    The file is replaced at once. Raises ValueError for one that is no parameter file of the node, OSError.
    """
    before, new = read_with(source, values)
    path = target or source
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(new, encoding="utf-8", newline="")
    partial.chmod(stat.S_IMODE(source.stat().st_mode))
    partial.replace(path)
    return [
        f"{name}: {before[name]!r} -> {new!r}" if name in before else f"{name}: {new!r}" for name, new in values.items()
    ]


def read_with(source: Path, values: Mapping[str, Value]) -> tuple[dict[str, object], str]:
    """(The node's parameters in a file, the file's text with others set); line ends stay as they are.

    Raises ValueError for a file that is no parameter file of the node, or whose form does not let values be set without
    changing anything else: an anchor that is used elsewhere, a text over several lines. OSError.
    """
    with source.open(encoding="utf-8", newline="") as file:
        text = file.read()
    new = with_values(text, values, str(source))
    document = _unshared(yaml.safe_load(text))
    section = _parameters_of(document)
    assert section is not None  # with_values found it
    before = dict(section)
    section.update(values)
    try:
        is_as_meant = yaml.safe_load(new) == document and new.count("#") == text.count("#")
    except yaml.YAMLError:
        is_as_meant = False
    if not is_as_meant:
        raise ValueError(
            f"{source} is of a form in which values cannot be changed one by one (an anchor, or a value over several "
            f"lines); write {', '.join(f'{name}: VALUE' for name in values)} there plainly"
        )
    return before, new


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
        start, end = node.start_mark.index, node.end_mark.index
        text = _replaced(text, start, end, written if text[start - 1].isspace() else f" {written}")
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


def _parameters_of(document: object) -> dict[str, object] | None:
    """The node's parameters in a parsed file, themselves; None if it has none."""
    if not isinstance(document, dict):
        return None
    for name, value in document.items():
        if isinstance(value, dict):
            if str(name).rpartition("/")[2] == NODE and isinstance(value.get("ros__parameters"), dict):
                found: dict[str, object] = value["ros__parameters"]
                return found
            if name != "ros__parameters" and (inner := _parameters_of(value)) is not None:
                return inner
    return None


def _unshared(value: Any) -> Any:
    """The same without parts that are one object in several places, as YAML's aliases make them."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


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
    if section.flow_style:
        new = ", ".join(f"{name}: {_written(value)}" for name, value in values.items())
        place = section.start_mark.index + text[section.start_mark.index :].index("{") + 1  # behind an anchor, if any
        return text[:place] + new + (", " if section.value else "") + text[place:]
    first = section.value[0][0].start_mark
    line = text.rfind("\n", 0, first.index) + 1
    end = "\r\n" if "\r\n" in text else "\n"
    new = "".join(f"{' ' * first.column}{name}: {_written(value)}{end}" for name, value in values.items())
    return text[:line] + new + text[line:]
