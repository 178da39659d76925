"""What strangers may try."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from flows.service import build_app
from flows.serving.guarding import LARGEST_BODY, access
from flows.serving.pages import docs_page, try_page
from flows.serving.served import InService
from stages.errors import UserError
from tests.storefront import HERE

HOSTILE = '<script>alert("x")</script> & ="A1"'


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "give either user or history"),
        ({"user": "u", "history": ["i"]}, "give either user or history"),
        ({"user": 7}, "user: Input should be a valid string"),
        ({"user": ""}, "user: "),
        ({"user": "x" * 257}, "at most 256"),
        ({"history": ["i"] * 1001}, "at most 1000"),
        ({"history": "i"}, "history: "),
        ({"user": "u", "k": 0}, "k: "),
        ({"user": "u", "k": 21}, "this model gives at most 20 items"),
        ({"user": "u", "k": 10**40}, "k"),
        ({"user": "u", "k": "5"}, "k: "),
        ({"user": "u", "<b>\u202e": 1}, "<b>?: Extra inputs"),
        ([], "body: "),
    ],
)
def test_a_wrong_request_is_answered_with_one_sentence(client: TestClient, body: Any, words: str) -> None:
    answer = client.post("/recommend", json=body)
    assert answer.status_code == 422
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"user": "\\ud800"}',
        b'{"history": ["\\udfff"]}',
        b'{"user": "u", "k": NaN}',
        b'{"\\ud800": 1}',
    ],
)
def test_broken_bodies_are_refused_and_the_service_goes_on(client: TestClient, body: bytes) -> None:
    answer = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert isinstance(answer.json()["error"], str)
    assert client.get("/ready").status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_does_not_say_json_is_told_what_to_say(client: TestClient, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = client.post("/recommend", content=b'{"user": "u"}', headers=headers)
    assert (answer.status_code, answer.json()) == (415, {"error": "send content-type: application/json"})


@pytest.mark.parametrize(
    ("body", "words"),
    [(b'{"user":', "the body is not JSON (character 8)"), (b'{"\xff', "the body is not JSON (not UTF-8 at byte 2)")],
)
def test_a_body_that_is_no_json_is_told_where(client: TestClient, body: bytes, words: str) -> None:
    answer = client.post("/recommend", content=body, headers={"content-type": "application/json; charset=utf-8"})
    assert 400 <= answer.status_code < 500
    assert answer.json() == {"error": words}


@pytest.mark.parametrize("path", ["/", "/health", "/ready"])
def test_the_head_alone_can_be_asked_for(client: TestClient, path: str) -> None:
    assert client.head(path).status_code == 200
    assert client.head("/model").status_code == 405


@pytest.mark.parametrize(
    "hostile", ["../../etc/passwd", HOSTILE, "a\0b", "'; drop table items; --", "%2e%2e", "‮evil", "🙂" * 100]
)
def test_hostile_ids_are_only_ever_ids(client: TestClient, hostile: str) -> None:
    answer = client.post("/recommend", json={"user": hostile})
    assert answer.json()["fallback"] is True
    assert answer.headers["content-type"] == "application/json"
    assert client.post("/search", json={"query": hostile}).status_code == 200
    assert client.get(f"/items/{quote(hostile, safe='')}").status_code == 404


def test_a_body_too_large_is_refused_whether_or_not_it_says_its_size(client: TestClient) -> None:
    big = b" " * (LARGEST_BODY + 1)
    assert client.post("/recommend", content=big).status_code == 413
    assert client.post(
        "/recommend", content=(big[start : start + 9999] for start in range(0, len(big), 9999))
    ).json() == {"error": f"the body is too large; at most {LARGEST_BODY} bytes are read"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost:9000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil.example", 403),
        ("localhost/x", 403),
        ("localhost:x", 403),
        ("", 403),
    ],
)
def test_a_foreign_host_header_is_refused(client: TestClient, host: str, status: int) -> None:
    assert client.get("/model", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"), [(HERE, 200), ("http://evil.example", 403), ("null", 403), ("http://localhost:8000", 403)]
)
def test_a_foreign_page_cannot_ask(client: TestClient, origin: str, status: int) -> None:
    assert client.post("/search", json={"query": "x"}, headers={"origin": origin}).status_code == status


def test_beyond_this_machine_names_and_a_token_are_needed(monkeypatch: pytest.MonkeyPatch, shop: Path) -> None:
    monkeypatch.delenv("DRIFTREC_TOKEN", raising=False)
    token = "0123456789abcdef"
    for host in ("0.0.0.0", "::", "192.168.0.7", "shop.example"):  # noqa: S104
        with pytest.raises(UserError, match="--allowed-hosts"):
            access(host, None)
        with pytest.raises(UserError, match="DRIFTREC_TOKEN"):
            access(host, "shop.example:8000")
    with pytest.raises(UserError, match="at least 16"):
        access("127.0.0.1", None, "short")
    rule = access("0.0.0.0", "shop.example:8000", token)  # noqa: S104
    with TestClient(build_app(InService(shop), rule), base_url="http://shop.example:8000") as client:
        assert client.get("/health").status_code == 200
        assert client.get("/").status_code == 200
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": token}):
            assert client.get("/model", headers=given).status_code == 401
        assert client.get("/model", headers={"authorization": f"Bearer {token}"}).status_code == 200
        assert client.get("/health", headers={"host": "127.0.0.1:8000"}).status_code == 403


@pytest.mark.parametrize(
    ("allowed", "good", "bad"),
    [
        ("shop.example:443", ["shop.example", "Shop.Example:443"], ["shop.example:80", "other.example", "localhost"]),
        ("Shop.example", ["shop.example", "shop.example:80", "shop.example:443"], ["shop.example:8000"]),
        ("a.example:8000, [2001:db8::1]", ["a.example:8000", "[2001:db8::1]"], ["a.example", "2001:db8::1", ""]),
    ],
)
def test_a_default_port_is_the_same_whether_or_not_it_is_written(allowed: str, good: list[str], bad: list[str]) -> None:
    rule = access("0.0.0.0", allowed, "0123456789abcdef")  # noqa: S104
    assert all(map(rule.knows, good))
    assert not any(map(rule.knows, bad))
    near = access("127.0.0.1", allowed)
    assert all(map(near.knows, [*good, "localhost:9", "127.0.0.1:8000", "[::1]"]))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])  # noqa: S104
@pytest.mark.parametrize("name", ["https://shop.example", "shop.example:", "shop.example:http", "x:99999", "a b", "*"])
def test_a_name_that_is_none_is_refused_on_loopback_too(host: str, name: str) -> None:
    with pytest.raises(UserError, match="give name or name:port"):
        access(host, f"good.example,{name}", "0123456789abcdef")


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("https://shop.example", "shop.example", 200),
        ("https://shop.example", "shop.example:443", 200),
        ("https://shop.example:8443", "shop.example", 403),
        ("http://shop.example", "shop.example:443", 403),
    ],
)
def test_a_page_behind_a_proxy_may_ask(shop: Path, origin: str, host: str, status: int) -> None:
    with TestClient(build_app(InService(shop), access("127.0.0.1", "shop.example"))) as client:
        assert client.get("/model", headers={"host": host, "origin": origin}).status_code == status


def test_pages_load_nothing_from_elsewhere_and_run_only_their_own_script(client: TestClient) -> None:
    page, policy = try_page()
    assert client.get("/").text == page
    for path in ("/", "/docs"):
        answer = client.get(path)
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text
        assert "https://" not in answer.text
    assert "unsafe-inline" not in policy
    assert "innerHTML" not in page
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in client.get("/docs").text


def test_the_description_of_the_api_is_escaped() -> None:
    schema = {"paths": {"/x": {"get": {"description": HOSTILE, "responses": {}}}}, "components": {"schemas": {}}}
    assert "<script" not in docs_page(schema)[0]
