"""Prefect's API asked as a client of ours asks it: with the login, and with a CSRF token for what changes something."""

from __future__ import annotations

import base64
import json
import urllib.request
from typing import Any


def request_for(
    address: str, path: str, body: dict[str, Any] | None = None, secret: str | None = None
) -> urllib.request.Request:
    """A request to `path` of the API at `address`; with a body it is a POST."""
    headers = {"Content-Type": "application/json"}
    if secret is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode()}"
    if body is None:
        return urllib.request.Request(f"{address}/{path}", headers=headers)
    with urllib.request.urlopen(request_for(address, "csrf-token?client=test", secret=secret), timeout=30) as reply:
        token = json.load(reply)["token"]
    headers |= {"Prefect-Csrf-Client": "test", "Prefect-Csrf-Token": token}
    return urllib.request.Request(f"{address}/{path}", json.dumps(body).encode(), headers)


def asked(address: str, path: str, body: dict[str, Any] | None = None, secret: str | None = None) -> Any:
    """What the API answers."""
    with urllib.request.urlopen(request_for(address, path, body, secret), timeout=30) as reply:
        return json.load(reply)
