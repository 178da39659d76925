"""The service's own pages: one to try it, one that documents it. Neither loads anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.reporting.page import Markup, TableRow, document, element, join, style_sheet, table

DOCS_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'"


def try_page() -> tuple[str, str]:
    """The page to try the service, and the policy that lets exactly its own script and style run."""
    style = style_sheet() + _read("page.css")
    script = _read("page.js")
    page = _read("page.html").replace("STYLE", style).replace("SCRIPT", script)
    policy = (
        f"default-src 'none'; script-src 'sha256-{_hash(script)}'; style-src 'sha256-{_hash(style)}'; img-src data:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
    return page, policy


def docs_page(schema: Mapping[str, Any]) -> tuple[str, str]:
    """The OpenAPI description as a page, and its policy.

    Args:
        schema: contents of /openapi.json.
    """
    parts = [
        element("h1", "driftrec API"),
        Markup('<p class="lead">The same as <a href="/openapi.json">openapi.json</a>, for people. '
               'Try it on <a href="/">the page</a>. Every error is <code>{"error": "one sentence"}</code>.</p>'),
    ]  # fmt: skip
    for path, verbs in schema["paths"].items():
        parts += [_operation(path, verb, about, schema) for verb, about in verbs.items()]
    return document("driftrec API", join(*parts)), DOCS_POLICY


def _operation(path: str, verb: str, about: Mapping[str, Any], schema: Mapping[str, Any]) -> Markup:
    sent = _schema_of(about.get("requestBody", {}), schema)
    answered = _schema_of(about["responses"].get("200", {}), schema)
    return join(
        element("h2", f"{verb.upper()} {path}"),
        element("p", about.get("description", "")),
        *([element("h3", "Request"), _fields(sent)] if sent else []),
        *([element("h3", "Reply"), _fields(answered)] if answered else []),
    )


def _schema_of(body: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The named object that a JSON body holds; empty where it has none."""
    found = body.get("content", {}).get("application/json", {}).get("schema", {})
    name = found.get("$ref", "").rpartition("/")[2]
    return schema["components"]["schemas"].get(name, {})


def _fields(about: Mapping[str, Any]) -> Markup:
    required = about.get("required", [])
    rows = [
        TableRow(element("code", name), [(_kind(field), "left"), (_note(field, name in required), "left")])
        for name, field in about.get("properties", {}).items()
    ]
    return join(element("p", about.get("description", "")), _left(table(["field", "type", "rule"], rows, left=True)))


def _left(made: Markup) -> Markup:
    return Markup(f'<div class="words">{made.html}</div>')


def _kind(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(one) for one in field["anyOf"]))
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    return str(field.get("type", "any"))


def _note(field: Mapping[str, Any], required: bool) -> str:
    bounds = {"minLength": "at least {} character", "maxLength": "at most {} characters", "minimum": "at least {:g}"}
    bounds |= {"maxItems": "at most {} entries", "default": "default {}"}
    said = [
        text.format(one[key]) for one in _variants(field) for key, text in bounds.items() if one.get(key) is not None
    ]
    return "; ".join([*(["required"] if required else []), *said, *filter(None, [field.get("description")])])


def _variants(field: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield field
    yield from field.get("anyOf", [])


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
