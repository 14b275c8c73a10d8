"""Command lines of this package: draccus dataclasses as `--key=value`, and errors in words instead of tracebacks."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import draccus
from draccus.utils import DraccusException

from dit_policy_ros.policy.configuration import ConfigurationError


def parse[T](config_class: type[T], args: Sequence[str] | None = None, prog: str | None = None) -> T:
    """The configuration that `args` (default: the command line) describe; `--config` is short for `--config_path`.

    Exits with status 2 and one message on an unknown key, a wrong type or a file that is not there.
    """
    given = [_as_text(_long_form(arg), config_class) for arg in (sys.argv[1:] if args is None else args)]
    try:
        return draccus.parse(config_class, args=given, prog=prog)
    except (DraccusException, OSError) as error:
        print(f"error: {_reasons(error)}\n(--help lists every option)", file=sys.stderr)
        raise SystemExit(2) from None


def run[T](program: Callable[[T], int], config_class: type[T], prog: str) -> int:
    """Exit status of a program: an error that its message explains is printed, and gives 1."""
    config = parse(config_class, prog=prog)
    try:
        return program(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        return int(getattr(stop, "exit_status", 130))


def _reasons(error: BaseException | None) -> str:
    reasons = []
    while error is not None:
        reasons.append(str(error))
        if isinstance(error, ConfigurationError):  # says all by itself, without draccus's words around it
            return str(error)
        error = error.__cause__
    return ": ".join(reasons)


def _long_form(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return f"--config_path{equals}{value}" if name == "--config" else arg


def _as_text(arg: str, config_class: type) -> str:
    """The argument, its value quoted if the option is a text: YAML reads `off` as false, and stops at `*.mcap`."""
    name, equals, value = arg.partition("=")
    kind: Any = config_class
    for part in name.removeprefix("--").split("."):
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return f"{name}={json.dumps(value, ensure_ascii=False)}" if equals and kind is str else arg
