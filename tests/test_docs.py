"""The documents name only what exists: functions, tests, files, settings."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

from stages.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LATER: set[str] = set()
"""Named before it exists."""


def found(pattern: str) -> list[tuple[str, str]]:
    return [(page.name, hit) for page in PAGES for hit in re.findall(pattern, page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "name"), found(r"`((?:flows|models|regularizers|stages)(?:\.\w+)+)`"))
def test_a_function_named_in_a_page_exists(page: str, name: str) -> None:
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for part in parts[depth:]:
            assert hasattr(value, part), f"{page}: {name}"
            value = getattr(value, part)
        return
    pytest.fail(f"{page}: {name}")


@pytest.mark.parametrize(("page", "name"), found(r"`(test_\w+::test_\w+)`"))
def test_a_test_named_in_a_page_exists(page: str, name: str) -> None:
    file, test = name.split("::")
    tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
    assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, page


@pytest.mark.parametrize(("page", "place"), found(r"`((?:flows|models|regularizers|stages|tests|docs)/[\w/]+\.\w+)`"))
def test_a_file_named_in_a_page_exists(page: str, place: str) -> None:
    assert place in LATER or (ROOT / place).exists(), page


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", page.read_text(encoding="utf-8")):
            place = (page.parent / target).resolve()
            assert place.exists() or place.relative_to(ROOT).as_posix() in LATER, f"{page.name}: {target}"


def test_the_readmes_config_is_accepted(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    config = tmp_path / "shop.toml"
    config.write_text(block, encoding="utf-8")
    assert load_config(config).name == tomllib.loads(block)["name"] == "shop"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_heading_stands_twice_in_a_page(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ .+$", text, re.MULTILINE)
    assert len(set(headings)) == len(headings) > 0
