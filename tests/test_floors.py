"""Who may import whom: what ruff's banned-api cannot say, because it is one list for the whole repository."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "flows": {"flows", "stages", "models", "regularizers"},
    "stages": {"stages", "models", "regularizers"},
    "models": {"models"},
    "regularizers": {"regularizers"},
}
RESERVED = {
    "prefect": ("flows/",),
    # MLflow runs a copy of flows/pyfunc.py to load a model: it stands alone, apart from what records runs.
    "mlflow": ("flows/tracking.py", "flows/pyfunc.py"),
    "fastapi": ("flows/service.py",),
}
NOWHERE = {"pickle", "cloudpickle", "joblib", "dill"}


def imported(source: str) -> Iterator[str]:
    """Top-level names a module imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def broken(place: str, source: str) -> list[str]:
    """Imports that the module at `place` may not make."""
    allowed = FLOORS[place.split("/")[0]]
    return [
        name
        for name in imported(source)
        if name in NOWHERE
        or (name in FLOORS and name not in allowed)
        or (name in RESERVED and not place.startswith(RESERVED[name]))
    ]


def modules() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]


@pytest.mark.parametrize("place", modules())
def test_a_module_imports_only_from_its_own_floor_and_below(place: str) -> None:
    assert broken(place, (ROOT / place).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("models/beam.py", "from stages.config import Config"),
        ("models/beam.py", "import regularizers.proximal"),
        ("regularizers/gate.py", "from models import trie"),
        ("stages/train.py", "import flows"),
        ("stages/train.py", "def late():\n    from prefect import task"),
        ("flows/compare.py", "import mlflow"),
        ("flows/tracking.py", "import fastapi"),
        ("flows/tracking.py", "import pickle"),
    ],
)
def test_a_forbidden_import_is_caught(place: str, source: str) -> None:
    assert len(broken(place, source)) == 1


@pytest.mark.parametrize("name", ["prefect", "mlflow", "fastapi", "pickle", "joblib", "dill", "flows"])
def test_ruff_refuses_the_import_below_flows(name: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "--select", "TID251"]
    snippet = subprocess.run(
        [*command, "--stdin-filename", "stages/snippet.py", "-"],
        input=f"import {name}\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert snippet.returncode == 1, snippet.stderr
    assert f"TID251 `{name}` is banned" in snippet.stdout


def test_every_package_is_a_regular_one() -> None:
    folders = {(ROOT / place).parent for place in modules()}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_file_in_flows_is_named_after_a_package() -> None:
    """Prefect's file entrypoints put flows/ first on sys.path: such a file would shadow the package."""
    reserved = {*RESERVED, *FLOORS, "torch", "polars", "peft", "transformers", "numpy", *sys.stdlib_module_names}
    assert {path.stem for path in (ROOT / "flows").glob("*.py")} & reserved == set()
