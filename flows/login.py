"""The login of the Prefect servers that driftrec starts: without it any page or user of the machine could command them.

One secret for a process, its client and its servers; a server that outlasts the command leaves it beside its database.
Knows no Prefect, which reads both variables once, when it is imported.
"""

from __future__ import annotations

import base64
import os
import secrets
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

SENT, ASKED_FOR = "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"
"""What a client sends, and what a server asks for: `user:password`."""
ORIGINS = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
FILE = "login"
"""In Prefect's folder, for its owner's eyes only."""
HERE = ("127.0.0.1", "localhost", "::1")
PATIENCE = 5.0
"""Seconds a server has to say whether it takes a login."""
REMEDY = f'export {SENT}="$(cat WORKSPACE/prefect/{FILE})" with the workspace of the command that started it'


def choose() -> None:
    """Fill in both variables alike: the user's own, else what is stored beside Prefect's database, else a new secret.

    Where the user's Prefect is another machine's, or set up in a profile, its own login is left to count.
    """
    given = os.environ.get(SENT) or os.environ.get(ASKED_FOR)
    home = os.environ.get("PREFECT_HOME")
    address = os.environ.get("PREFECT_API_URL")
    elsewhere = bool(address) and urlsplit(address).hostname not in HERE
    if given or not (elsewhere or (home and (Path(home) / "profiles.toml").exists())):
        _set(given or (stored(Path(home)) if home else None))


def keep(home: Path) -> None:
    """Store this process's login in Prefect's folder, where later commands find it.

    Args:
        home: that folder.
    """
    from stages.workspace import replacing

    _set(os.environ.get(ASKED_FOR) or stored(home))
    secret = os.environ[ASKED_FOR]
    if stored(home) != secret:
        with replacing(home / FILE) as temporary:
            temporary.touch(0o600)
            temporary.write_text(secret + "\n", encoding="utf-8")


def home_in(root: Path) -> Path:
    """Prefect's folder for a workspace, in which its database is: the user's own, or one of the workspace."""
    return Path(os.environ.get("PREFECT_HOME") or root.resolve() / "prefect")


def stored(home: Path) -> str | None:
    """The login in Prefect's folder; None where there is none."""
    try:
        found = (home / FILE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return found if ":" in found else None


def _set(secret: str | None) -> None:
    secret = secret or f"driftrec:{secrets.token_urlsafe(24)}"
    for name in (SENT, ASKED_FOR):
        os.environ.setdefault(name, secret)


def origins(port: int) -> str:
    """The only pages that may ask a server on `port` from a browser: its own."""
    return f"http://127.0.0.1:{port},http://localhost:{port}"


def server_environment(home: Path, port: int) -> dict[str, str]:
    """Variables of a Prefect server of ours on `port`; its login is stored in `home`."""
    keep(home)
    own = os.environ.get(ORIGINS, origins(4200))
    return {**os.environ, ORIGINS: origins(port) if own == origins(4200) else own}


def fits(address: str, secret: str | None) -> bool:
    """Whether the server at an API address of this machine lets in who sends `secret`; True where it cannot be told."""
    if not address.startswith("http://") or urlsplit(address).hostname not in HERE:
        return True
    header = {} if secret is None else {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}
    request = urllib.request.Request(f"{address.rstrip('/')}/version", headers=header)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE):  # noqa: S310 (its scheme is checked)
            return True
    except urllib.error.HTTPError as error:
        with error:
            return error.code != 401
    except (OSError, ValueError):
        return True


def words(home: Path) -> str:
    """What to type into the page: in full on a terminal; elsewhere, such as in a journal, the file that holds it."""
    return f"login {os.environ[ASKED_FOR]}" if sys.stderr.isatty() else f"login in {home / FILE}"
