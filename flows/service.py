"""The HTTP service: recommendations and search by the champion, on this machine unless told otherwise.

The only module that imports fastapi. It parses and answers; of its parts in `flows.serving`, `served` holds the model,
`batching` ranks what arrives together, and `guarding` keeps strangers out.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException as PlainHTTPException

from flows.machine import keep_freed_memory
from flows.serving import pages
from flows.serving.answers import item_reply, model_reply, recommend_reply, search_reply
from flows.serving.batching import Batcher, BusyError, Rank
from flows.serving.connections import QUEUE, Punctual, quieten
from flows.serving.guarding import SHUT, Access, App, Guard, Scope
from flows.serving.metrics import CONTENT_TYPE, ServiceMetrics
from flows.serving.schema import (
    LONGEST_ID,
    Error,
    ItemReply,
    ModelReply,
    RecommendReply,
    RecommendRequest,
    SearchReply,
    SearchRequest,
    State,
)
from flows.serving.searching import Ranking
from flows.serving.served import NOBODY, InService, Served, one_thread_a_pass
from stages.errors import UserError

LOOK = 1.0
"""Seconds between two looks for a new champion."""
LARGEST = 32
"""Requests being ranked at once, over all threads that rank."""
SWITCH = 0.0005
"""Seconds a thread may hold the interpreter: ranking threads must not keep the next requests from being read."""
PATIENCE = 30.0
"""Seconds after which a request is given up."""
UNROUTED = {
    404: "nothing is at this address; /docs lists what is",
    405: "not by this verb; /docs lists what is asked how",
}
STANDARD = {status.phrase for status in HTTPStatus}
log = logging.getLogger("flows")


class Desk:
    """Answers requests with the model that is in service when they arrive.

    Args:
        place: holds that model.
        metrics: what is counted.
    """

    def __init__(self, place: InService, metrics: ServiceMetrics) -> None:
        self.place, self.metrics = place, metrics
        workers = place.current.side_by_side
        self.batcher = Batcher(-(-LARGEST // workers), observe=metrics.batch, workers=workers)

    async def recommend(self, asked: RecommendRequest) -> Response:
        """The items most likely next for a user of the log, or for anybody with a history.

        For an unknown user, or a history without a known item, the fallback answers and says so.
        """
        served = self.place.current
        _check_length(asked.k, served)
        past = served.past(asked.user, asked.history)
        if past.reason is None:
            ranking = await self._ranked(served.rank, past, asked.k)
        else:
            ranking = served.fallback(asked.k)
            self.metrics.fallbacks.inc()
        return _json(recommend_reply(served, past, ranking))

    async def search(self, asked: SearchRequest) -> Response:
        """The items that fit a query; the reply's `method` says who found them."""
        served = self.place.current
        _check_length(asked.k, served)
        nobody = asked.user is None and asked.history is None
        past = NOBODY if nobody else served.past(asked.user, asked.history)
        ranking = await self._ranked(served.searcher.search, (asked.query, past), asked.k)
        return _json(search_reply(served, past, ranking))

    async def item(self, item_id: str) -> Response:
        """An item of the catalogue, with those most often taken beside it."""
        served = self.place.current
        number = served.numbers.get(item_id) if len(item_id) <= LONGEST_ID else None
        if number is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"item {_short(item_id)} is not in the catalogue")
        return _json(item_reply(served, number))

    async def model(self) -> Response:
        """The model in service, its limits, and some users to try it with."""
        return _json(model_reply(self.place.current))

    async def health(self) -> Response:
        """Whether the process answers at all."""
        return _json(State(ok=True))

    async def ready(self) -> Response:
        """Whether recommendations can be asked for; `fault` says why a newer champion could not be loaded."""
        alive = self.batcher.alive
        return _json(State(ok=alive, fault=self.place.fault if alive else "the ranking thread has ended"), alive)

    async def counted(self) -> Response:
        """Counters and times in Prometheus' text format."""
        return Response(self.metrics.text(self.place, self.batcher), media_type=CONTENT_TYPE)

    async def watch(self) -> None:
        """Look for a new champion every second, loading it beside the old one."""
        while True:
            await asyncio.sleep(LOOK)
            try:
                await asyncio.to_thread(self.place.look)
            except Exception:
                # Whatever is wrong with the new model, the old one goes on answering.
                log.exception("the look-out for a new champion failed")
                self.place.fault = "the look-out for a new champion failed; see the service's log"

    async def _ranked(self, rank: Rank, question: Any, k: int) -> Ranking:
        async with asyncio.timeout(PATIENCE):
            return await asyncio.wrap_future(self.batcher.submit(rank, question, k))


def build_app(place: InService, rule: Access) -> Guard:
    """The whole service as an ASGI application.

    Args:
        place: the model in service.
        rule: who may ask.
    """
    metrics = ServiceMetrics()
    desk = Desk(place, metrics)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        quieten(asyncio.get_running_loop())
        watching = asyncio.create_task(desk.watch())
        yield
        watching.cancel()
        await asyncio.to_thread(desk.batcher.close)

    # FastAPI's own pages of documentation load scripts from elsewhere; /docs here is a page of ours.
    app = FastAPI(title="driftrec", docs_url=None, redoc_url=None, lifespan=running)
    _add_routes(app, desk)
    _add_pages(app)
    _add_handlers(app)

    def note(scope: Scope, status: int, seconds: float) -> None:
        metrics.request(getattr(scope.get("route"), "path_format", "other"), status, seconds)

    return Guard(app, rule, note)


def serve(
    root: Path,
    host: str,
    port: int,
    rule: Access,
    method: str | None = None,
    seed: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a workspace's champion until Ctrl-C or SIGTERM; what was asked by then is still answered.

    Args:
        root: workspace.
        host: address to listen on.
        port: where; 0 takes a free one.
        rule: from `flows.serving.guarding.access`.
        method: always this method's newest model; absent: the champion.
        seed: of the method.
        say: told the address once the model is loaded.

    Raises:
        UserError: there is no model to serve, or the address cannot be used.
    """
    keep_freed_memory()
    with _ends_well(), listening(host, port) as listener:
        place = InService(root, method, seed)
        one_thread_a_pass(place.current)
        job, number = place.current.job, listener.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        sys.setswitchinterval(SWITCH)
        listener.listen()  # from here on a client is not refused, it waits
        say(f"serving {job.method}, seed {job.seed}, after stage {job.stage}: http://{name}:{number}")
        uvicorn.Server(settings_of(build_app(place, rule))).run(sockets=[listener])


def settings_of(app: App) -> uvicorn.Config:
    """How uvicorn serves `app`."""
    return uvicorn.Config(
        app, http=Punctual, log_level="warning", server_header=False, backlog=QUEUE, timeout_graceful_shutdown=30
    )


@contextmanager
def _ends_well() -> Iterator[None]:
    """A service that is told to stop has done its work: SIGTERM and Ctrl-C end the process with code 0.

    While it answers, uvicorn takes the signal, lets the last answers go, and then raises the signal again.
    """

    def end(*_: object) -> None:
        raise SystemExit(0)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listening(host: str, port: int) -> socket.socket:
    """A bound socket; asked for before the model is loaded, so that a mistake is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only of a socket that is said to be TCP does asyncio send small packets at once: an answer's body would otherwise
    # wait 40 ms for the client to acknowledge its head.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from None
    return listener


def _add_routes(app: FastAPI, desk: Desk) -> None:
    routes: list[tuple[str, str, Callable[..., Any], type[BaseModel] | None]] = [
        ("POST", "/recommend", desk.recommend, RecommendReply),
        ("POST", "/search", desk.search, SearchReply),
        ("GET", "/items/{item_id:path}", desk.item, ItemReply),
        ("GET", "/model", desk.model, ModelReply),
        ("GET", "/health", desk.health, State),
        ("GET", "/ready", desk.ready, State),
        ("GET", "/metrics", desk.counted, None),
    ]
    for verb, path, answer, reply in routes:
        responses: dict[int | str, dict[str, Any]] = {"4XX": {"model": Error}, "5XX": {"model": Error}}
        if reply is not None:
            responses[200] = {"model": reply}
        app.add_api_route(path, answer, methods=[verb], response_model=None, responses=responses)
    # What looks whether a service is up often asks for the head alone.
    for path, answer in (("/health", desk.health), ("/ready", desk.ready)):
        app.add_api_route(path, answer, methods=["HEAD"], response_model=None, include_in_schema=False)


def _add_pages(app: FastAPI) -> None:
    page, policy = pages.try_page()

    async def try_it() -> Response:
        """A page to try the service in a browser."""
        return Response(page, media_type="text/html", headers={SHUT[0].decode(): policy})

    async def documentation() -> Response:
        """What can be asked, from the OpenAPI description; it loads nothing from elsewhere."""
        text, rule = pages.docs_page(app.openapi())
        return Response(text, media_type="text/html", headers={SHUT[0].decode(): rule})

    app.add_api_route("/", try_it, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/docs", documentation, include_in_schema=False)


def _add_handlers(app: FastAPI) -> None:
    """Every error is JSON with one sentence."""

    async def told(request: Request, error: Exception) -> Response:
        if isinstance(error, PlainHTTPException):
            if isinstance(error.__cause__, UnicodeDecodeError):  # of the body, says FastAPI
                return _error(error.status_code, f"the body is not JSON (not UTF-8 at byte {error.__cause__.start})")
            sentence = UNROUTED.get(error.status_code) if error.detail in STANDARD else None
            return _error(error.status_code, sentence or str(error.detail), error.headers)
        if isinstance(error, RequestValidationError):
            if not _says_json(request):
                return _error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send content-type: application/json")
            return _error(HTTPStatus.UNPROCESSABLE_ENTITY, _first_fault(error))
        if isinstance(error, BusyError):
            return _error(HTTPStatus.SERVICE_UNAVAILABLE, str(error), {"retry-after": "1"})
        if isinstance(error, TimeoutError):
            return _error(HTTPStatus.SERVICE_UNAVAILABLE, f"no answer within {PATIENCE:.0f} seconds; try again later")
        return _error(HTTPStatus.INTERNAL_SERVER_ERROR, "a fault inside the service; its log says more")

    for kind in (PlainHTTPException, RequestValidationError, BusyError, TimeoutError, Exception):
        app.add_exception_handler(kind, told)


def _says_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _first_fault(error: RequestValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON (character {first['loc'][-1]})"
    place = ".".join(_plain(part) for part in first["loc"] if part != "body") or "body"
    return f"{place}: {_plain(first['msg'].removeprefix('Value error, '))}"


def _check_length(k: int, served: Served) -> None:
    if k > served.limit:
        sentence = f"k is {k if k < 10**9 else 'too large'}; this model gives at most {served.limit} items"
        raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, sentence)


def _json(reply: BaseModel, good: bool = True) -> Response:
    status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
    return Response(reply.model_dump_json(), status_code=status, media_type="application/json")


def _error(status: int, sentence: str, headers: Any = None) -> Response:
    body = Error(error=sentence).model_dump_json()
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def _plain(part: object) -> str:
    """A client's text, short and in ASCII: lone surrogates and control characters cannot be sent back as they came."""
    text = str(part)
    return "".join(letter if letter.isprintable() and letter.isascii() else "?" for letter in text[:120])


def _short(text: str) -> str:
    return repr(_plain(text))
