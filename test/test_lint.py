"""ruff, mypy and import-linter: the rules of pyproject.toml hold."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = {
    "ruff": ["-m", "ruff", "check", "."],
    "mypy": ["-m", "mypy"],
    "import-linter": ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
}


@pytest.mark.timeout(600)  # mypy without its cache reads all of torch
@pytest.mark.parametrize("tool", TOOLS)
def test_is_clean(tool: str) -> None:
    run = subprocess.run([sys.executable, *TOOLS[tool]], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"\n{run.stdout}{run.stderr}"
