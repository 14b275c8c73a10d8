"""Command lines of this package: draccus dataclasses as `--key=value`, and errors in words instead of tracebacks."""

import json
import re
import sys
from argparse import Action
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from draccus import ChoiceRegistry
from draccus.argparsing import ArgumentParser
from draccus.help_formatter import SimpleHelpFormatter
from draccus.utils import DraccusException

from dit_policy_ros.policy.configuration import ConfigurationError


def parse[T](
    config_class: type[T], args: Sequence[str] | None = None, prog: str | None = None, examples: str | None = None
) -> T:
    """The configuration that `args` (default: the command line) describe; `--config` is short for `--config_path`, and
    `--switch` for `--switch=true`.

    Exits with status 2 and one message on an unknown key, a wrong type or a file that is not there. `examples` end the
    help.
    """
    long_forms = [_long_form(arg) for arg in (sys.argv[1:] if args is None else args)]
    given = list(_texts_quoted(_switched_on(long_forms, config_class), config_class))
    usage = _usage(config_class, prog)
    try:
        parser = ArgumentParser(config_class, formatter_class=_HelpFormatter, prog=prog, usage=usage, epilog=examples)
        config: T = parser.parse_args(given)
        return config
    except (DraccusException, OSError) as error:
        said = _in_words(error, given, config_class) or _reasons(error)
        print(f"error: {said}\n(--help lists every option)", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == 2:
            for said in _meant(given, config_class):
                print(said, file=sys.stderr)
        raise


def run[T](
    program: Callable[[T], int],
    config_class: type[T],
    prog: str,
    examples: str | None = None,
    args: Sequence[str] | None = None,
) -> int:
    """Exit status of a program: an error that its message explains is printed, and gives 1. `args` as for `parse`."""
    config = parse(config_class, args, prog, examples)
    try:
        return program(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"error: {named}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return int(getattr(stop, "exit_status", 130))


_NUMBERS = {int: "a whole number", float: "a number", bool: "true or false"}


class _HelpFormatter(SimpleHelpFormatter):
    """Draccus's help without what tells nothing: empty defaults, and an option a group that takes a file for it."""

    def _format_action(self, action: Action) -> str:
        if (action.help or "").startswith("Config file for"):
            return ""
        return str(super()._format_action(action))

    def _get_help_string(self, action: Action) -> str | None:
        if action.default is None or action.default in ("", {}, []):
            return action.help
        text: str | None = super()._get_help_string(action)
        return text


def _usage(config_class: type, prog: str | None) -> str | None:
    """What must be given, in place of every option's name."""
    if prog is None or not is_dataclass(config_class):
        return None
    needed = [one.name for one in fields(config_class) if one.default is one.default_factory is MISSING]
    return " ".join([f"python -m {prog}", *(f"--{name}={name.upper()}" for name in needed), "[--OPTION=VALUE ...]"])


def _reasons(error: BaseException | None) -> str:
    reasons = []
    while error is not None:
        reasons.append(str(error))
        if isinstance(error, ConfigurationError):  # says all by itself, without draccus's words around it
            return str(error)
        error = error.__cause__
    return ": ".join(reasons)


def _in_words(error: Exception, given: Sequence[str], config_class: type) -> str:
    """What is expected of the option that draccus could not read; empty if its own words must do."""
    found = re.match(r"`([\w.]+)`", str(error))
    for arg in reversed(given):
        option, _, value = arg.removeprefix("--").partition("=")
        kind = _kind(option, config_class)
        if option == found[1] if found else is_dataclass(kind):  # draccus does not name a group whose type is chosen
            expected = _expected(option, value, kind)
            return f"--{option} is '{value}'; expected {expected}" if expected else ""
    return ""


def _expected(option: str, value: str, kind: Any) -> str:
    optional = isinstance(kind, UnionType) and [one for one in get_args(kind) if one is not NoneType]
    if optional and len(optional) == 1:
        kind = optional[0]
    if kind in _NUMBERS:
        return _NUMBERS[kind]
    if is_dataclass(kind) and not value.startswith("{"):
        first = "type" if isinstance(kind, type) and issubclass(kind, ChoiceRegistry) else fields(kind)[0].name
        return f"its options, each by itself, such as --{option}.{first}={value}"
    parts = get_args(kind)
    if get_origin(kind) is tuple and not value.startswith(("[", "(")):
        many = [value] * (1 if parts[-1] is Ellipsis else len(parts))
        return f"a list, as --{option}='[{', '.join(many)}]'"
    if get_origin(kind) is tuple and parts[-1] is not Ellipsis:
        return f"{len(parts)} values, as --{option}='[{', '.join('ABCDEFG'[: len(parts)])}]'"
    if get_origin(kind) is dict and not value.startswith("{"):
        return f"a value for each name, as --{option}='{{NAME: {_example(parts[1], value)}}}'"
    if get_origin(kind) is list and not value.startswith("["):
        return f"a list, as --{option}='[{_example(parts[0], value)}]'"
    return ""


def _example(kind: Any, value: str) -> str:
    return f"{{{fields(kind)[0].name}: {value}, ...}}" if is_dataclass(kind) else value


def _long_form(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return f"--config_path{equals}{value}" if name == "--config" else arg


def _switched_on(args: Sequence[str], config_class: type) -> Iterator[str]:
    """The arguments, with the value of each switch that stands by itself."""
    for arg, following in zip(args, [*args, "--"][1:], strict=True):
        alone = arg.startswith("--") and following.startswith("--") and "=" not in arg
        yield f"{arg}=true" if alone and _kind(arg.removeprefix("--"), config_class) is bool else arg


def _texts_quoted(args: Iterable[str], config_class: type) -> Iterator[str]:
    """The arguments, texts and paths in quotes: YAML reads `off` as false, 2026-11-22 as a date, stops at `*.mcap`."""
    quote_next = False
    for arg in args:
        name, equals, value = arg.partition("=")
        text = name.startswith("--") and _kind(name.removeprefix("--"), config_class) in (str, Path)
        if quote_next:
            yield json.dumps(arg, ensure_ascii=False)
        elif text and equals:
            yield f"{name}={json.dumps(value, ensure_ascii=False)}"
        else:
            yield arg
        quote_next = text and not equals and not quote_next


def _meant(given: Sequence[str], config_class: type) -> Iterator[str]:
    """What an option that is not there may have been meant to be, a line each."""
    there = [*_options(config_class), "config", "config_path", "help"]
    for name in (arg.removeprefix("--").partition("=")[0] for arg in given if arg.startswith("--")):
        near = [] if name in there else get_close_matches(name, there, 1)
        if near and _kind(name, config_class) is None:
            yield f"--{name}: did you mean --{near[0]}?"


def _options(group: Any, prefix: str = "") -> Iterator[str]:
    """All options of a configuration, and of every type of its groups that are a choice."""
    choices = group.get_known_choices().values() if issubclass(group, ChoiceRegistry) else ()
    for one in (group, *choices):
        for name, kind in get_type_hints(one).items():
            yield from (prefix + name, *(_options(kind, f"{prefix}{name}.") if is_dataclass(kind) else ()))
        if choices:
            yield f"{prefix}type"


def _kind(option: str, config_class: type) -> Any:
    kind: Any = config_class
    for part in option.split("."):
        kind = _field(kind, part) if is_dataclass(kind) else None
    return kind


def _field(group: Any, name: str) -> Any:
    """The type of a group's field; of a group that is a choice, also of a field that only some of its types have."""
    choices = group.get_known_choices().values() if issubclass(group, ChoiceRegistry) else ()
    return next((hints[name] for one in (group, *choices) if name in (hints := get_type_hints(one))), None)
