"""Prefect's server: which one is asked, and how an error says that it is out of reach, or takes no orders from us."""

from __future__ import annotations

GONE = ("Failed to reach API", "Timed out while attempting to connect", "ephemeral Prefect API server")
"""How Prefect says in a bare RuntimeError that there is no server."""


def server_asked() -> str:
    """The server that Prefect's client asks in this process, in words."""
    from prefect.settings import PREFECT_API_URL

    address = PREFECT_API_URL.value()
    return f"the Prefect server at {address}" if address is not None else OWN


OWN = "a Prefect server of this command's own, on the workspace's database"


def lost_prefect(error: BaseException | None) -> bool:
    """Whether an error, or one it came from, says that Prefect's server cannot be reached or does not work."""
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    while error is not None:
        if isinstance(error, httpx.TransportError):
            return True
        if isinstance(error, PrefectHTTPStatusError) and _no_service(error.response.status_code):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in GONE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _no_service(status: int) -> bool:
    """Whether an answer says that the server does not work, or asks for another login."""
    return status >= 500 or status == 401
