"""Options as tables for the documents: the comments of their dataclasses, which `--help` prints as well."""

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

from draccus import ChoiceRegistry
from draccus.wrappers.docstring import get_attribute_docstring


def markdown_table(kind: type, prefix: str = "") -> str:
    """One row an option of a dataclass of options: its name, its default, what it does.

    Options in groups are among them; a group that can be of several types has one row, which names them, and each type
    a table of its own, by `markdown_table(type, "--name.of.group.")`.
    """
    rows = (f"| `{name}` | {default} | {comment} |" for name, default, comment in _options(kind, prefix))
    return "\n".join(["| option | default | what it does |", "|---|---|---|", *rows])


def _options(kind: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    hints = get_type_hints(kind)
    for field in fields(kind):
        name, group = prefix + field.name, hints[field.name]
        if isinstance(group, type) and issubclass(group, ChoiceRegistry):
            yield f"{name}.type", _default_type(group), _one_of(group)
        elif isinstance(group, type) and is_dataclass(group):
            yield from _options(group, f"{name}.")
        else:
            comment = get_attribute_docstring(kind, field.name).comment_inline
            yield name, _default(field), comment.replace("|", "\\|")


def _one_of(group: type[ChoiceRegistry]) -> str:
    return f"one of {', '.join(group.get_known_choices())}, each with options of its own, below"


def _default_type(group: type[ChoiceRegistry]) -> str:
    default = getattr(group, "default_choice_name", None)
    return f"`{default()}`" if default else ""


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        return "must be given"
    if value is None or value in ("", [], {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
