"""The command line of interop."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from .. import interop
from ..checkpoint import CheckpointError
from .fields import InteropError
from .options import Options, Summary
from .read import to_native
from .write import to_lerobot


def print_summary(summary: Summary, console: Console) -> None:
    """The summary as tables."""
    console.print(f"[bold]from[/bold] {summary.source}")
    console.print(f"[bold]tensors[/bold] {summary.tensors} carried over, {len(summary.dropped)} left out")
    for name in summary.dropped:
        console.print(f"  left out: {name} (a table of positions, which is no weight)")
    table = Table()
    for heading in ("their field", "our field", "value"):
        table.add_column(heading, overflow="fold")
    for row in summary.fields:
        table.add_row(*row)
    console.print(table)
    for note in summary.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)


class _Parser(argparse.ArgumentParser):
    """Bad arguments are one sentence and exit status 1, as all else that prevents a conversion."""

    def error(self, message: str) -> NoReturn:
        raise InteropError(f"{message}; see --help")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = _Parser(
        prog="python -m dit_policy_ros.policy.interop", description=(interop.__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a checkpoint's folder")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder to write")
    parser.add_argument("--to", required=True, choices=["native", "lerobot"], help="the format of DST")
    parser.add_argument("--clip", help="local folder with CLIP's tokenizer (and config.json), for --to native")
    parser.add_argument("--embodiment", type=Path, help="the robot's YAML file, for --to native")
    parser.add_argument("--sampler", help="the export's default sampler, for --to lerobot: ddpm, ddim, euler, rk4")
    parser.add_argument("--steps", type=int, help="the export's default number of steps, for --to lerobot")
    parser.add_argument(
        "--flat-names", action="store_true", help="tensor names of transformers 5.6 and later, for --to lerobot"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    try:
        given = vars(parser.parse_args(arguments))
        source, target, to = (given.pop(name) for name in ("source", "target", "to"))
        summary = (to_native if to == "native" else to_lerobot)(source, target, Options(**given))
    except (InteropError, CheckpointError, OSError) as error:
        print(f"not converted: {error}", file=sys.stderr)
        return 1
    print_summary(summary, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
