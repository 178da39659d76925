"""The wheel holds four packages and nothing else, and nobody else owns their names."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGES = ("flows", "models", "regularizers", "stages")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a freshly built wheel; hatchling builds it alone, without network."""
    folder = tmp_path_factory.mktemp("dist")
    build = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    (built,) = folder.glob("driftrec-*.whl")
    with zipfile.ZipFile(built) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    """Distribution -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): Version(version) for name, version in pairs}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_the_wheels_top_level_is_exactly_the_four_packages(wheel: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    assert len(top) == len(PACKAGES) + 1


def test_the_wheel_holds_every_module_and_no_test(wheel: list[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert modules == {name for name in wheel if name.endswith(".py")}
    assert not any(Path(name).stem.startswith("test_") or Path(name).stem == "conftest" for name in modules)
    assert any(name.endswith("/licenses/LICENSE") for name in wheel)


@pytest.mark.parametrize("name", PACKAGES)
def test_driftrec_alone_owns_the_import_name(name: str) -> None:
    """pip overwrites a rival's folder of the same name without a word, and `pip check` stays content."""
    # An editable install maps folders by a path file, so a name may have no owner on record: look where it is, too.
    assert set(importlib.metadata.packages_distributions().get(name, ())) <= {"driftrec"}
    assert importlib.import_module(name).__file__ == str(ROOT / name / "__init__.py")


def test_every_pin_satisfies_every_requirement(project: dict, pins: dict[str, Version]) -> None:
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, wanted):
        assert canonical(requirement.name) in pins, f"{requirement.name} is missing from constraints.txt"
        assert pins[canonical(requirement.name)] in requirement.specifier, requirement


def test_the_pins_name_versions_and_no_host_build_or_folder(pins: dict[str, Version]) -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert not any(mark in text for mark in ("://", " @ ", "-e ", "--", "+cpu", "+cu"))
    assert "driftrec" not in pins
    assert str(pins["torch"]) == "2.13.0"


def test_prefect_stays_below_the_versions_that_break_it(project: dict) -> None:
    bounds = {Requirement(line).name: Requirement(line).specifier for line in project["dependencies"]}
    assert "0.151.0" not in bounds["fastapi"]  # server start fails
    assert "2.1.0" not in bounds["sqlalchemy"]  # cron schedules never fire, silently


def test_the_license_is_apache(project: dict) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert project["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_continuous_integration_runs_what_people_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").rstrip().endswith("exec make test")
    listed = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    for target in ("install", "demo", "test", "lint", "bench", "ui", "clean"):
        assert f"make {target} " in listed.stdout
