"""What the packages never call, what training never opens, and which versions are too old to be safe."""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from benchmarks import growing
from flows import endings
from stages.workspace import Workspace

ROOT = Path(__file__).parent.parent
PACKAGES = ("flows", "models", "regularizers", "stages")
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    ("torch", "load"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("numpy", "load"),
    ("np", "load"),
    ("os", "system"),
    ("os", "popen"),
    ("tempfile", "mktemp"),
}
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "telnetlib", "ftplib"}
TRUE = {"shell", "trust_remote_code", "allow_pickle"}
"""Keywords that may not be true, nor anything but a literal."""
FLOORS = {
    "torch": "2.10",
    "transformers": "5.3",
    "mlflow": "3.17",
    "prefect": "3.8.8",
    "pyarrow": "14.0.1",
}
"""The least versions without the holes named in docs/reliability.md."""


def breaches(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.func.id
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            name = (node.func.value.id, node.func.attr)
            if name in METHODS:
                yield ".".join(name)
        for keyword in node.keywords:
            literal = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in TRUE and not literal:
                yield f"{keyword.arg} is not False"


def test_the_packages_call_nothing_that_runs_what_it_reads() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): list(breaches(path.read_text(encoding="utf-8")))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }
    assert {place: names for place, names in found.items() if names} == {}
    assert len(found) > 50


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path, weights_only=True)",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(words, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_a_forbidden_call_is_caught(source: str) -> None:
    assert len(list(breaches(source))) >= 1


@pytest.mark.parametrize(("name", "floor"), sorted(FLOORS.items()))
def test_the_floors_leave_out_versions_with_known_holes(name: str, floor: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = next(one for one in map(Requirement, project["dependencies"]) if one.name == name)
    least = max(Version(part.version) for part in wanted.specifier if part.operator in (">=", "=="))
    assert least >= Version(floor)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (pinned,) = re.findall(rf"^{name}==(\S+)$", pins, re.MULTILINE)
    assert Version(pinned) in wanted.specifier


GUARD = """
import socket, sys

def outside(self, address, *more):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        sys.stderr.write(f"OUTSIDE {address}\\n")
        raise OSError("no connection to the outside")
    return honest(self, address, *more)

def lookup(host, *more, **named):
    if host not in (None, "127.0.0.1", "::1", "localhost", socket.gethostname()):
        sys.stderr.write(f"OUTSIDE {host}\\n")
        raise OSError("no name from the outside")
    return looked(host, *more, **named)

honest, looked = socket.socket.connect, socket.getaddrinfo
socket.socket.connect = socket.socket.connect_ex = outside
socket.getaddrinfo = lookup
sys.argv = ["driftrec", *sys.argv[1:]]
from flows.cli import main
main()
"""


def test_training_opens_no_connection_to_the_outside(tmp_path: Path) -> None:
    from tests.conftest import write_tiny_experiment

    config = write_tiny_experiment(tmp_path / "source")
    guarded("train", "-m", "single", "--workers", "1", "-c", str(config), "-w", str(tmp_path / "w"))
    assert (tmp_path / "w" / "runs" / "reports" / "latest.json").exists()
    # And what it wrote is its user's own.
    modes = {path.stat().st_mode & 0o077 for path in (tmp_path / "w").rglob("*")}
    assert modes == {0}


def guarded(*words: str) -> str:
    """What a command prints that is cut off from the outside and asks for nothing there."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "HF_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "-c", GUARD, *words],
        env={**own, "DRIFTREC_PREFECT": "off"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "OUTSIDE" not in done.stderr
    return done.stdout + done.stderr


def test_retraining_and_recording_open_no_connection_to_the_outside(tmp_path: Path) -> None:
    config = growing.write_shop(tmp_path, growing.OPEN_GATE)
    said = guarded("retrain", "--config", str(config), "--workspace", str(tmp_path / "w"))
    assert "first" in said
    assert (tmp_path / "w" / "champion.json").exists()
    assert (tmp_path / "w" / "mlflow.db").exists()


def test_the_guard_sees_a_connection(tmp_path: Path) -> None:
    script = GUARD.split("sys.argv")[0] + "socket.create_connection(('192.0.2.1', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "OUTSIDE" in done.stderr
    assert socket.gethostname()


def test_a_new_workspace_is_its_users_own(tmp_path: Path) -> None:
    Workspace(tmp_path / "w").claim("x")
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o700
    before = os.umask(0o022)
    try:
        signals = endings.logs.end_on_signals
        endings.logs.end_on_signals = lambda: None
        endings.own_process()
        assert os.umask(0o022) == 0o077
    finally:
        endings.logs.end_on_signals = signals
        os.umask(before)
