"""Options as tables for docs/convert.md: the comments of options.py, which `--help` prints as well."""

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from draccus.wrappers.docstring import get_attribute_docstring


def markdown_table(kind: type, prefix: str = "") -> str:
    """One row an option of a dataclass of options: its name, its default, what it does."""
    rows = (f"| `{name}` | {_default(field)} | {comment} |" for name, field, comment in _options(kind, prefix))
    return "\n".join(["| option | default | what it does |", "|---|---|---|", *rows])


def _options(kind: type, prefix: str) -> Iterator[tuple[str, Field[Any], str]]:
    for field in fields(kind):
        name = prefix + field.name
        if isinstance(field.type, type) and is_dataclass(field.type):
            yield from _options(field.type, f"{name}.")
        else:
            yield name, field, get_attribute_docstring(kind, field.name).comment_inline.replace("|", "\\|")


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
