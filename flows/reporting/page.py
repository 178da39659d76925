"""Pieces of a self-contained HTML page; every text that enters is escaped here and nowhere else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

MISSING = "–"


@dataclass(frozen=True)
class Markup:
    """HTML that is safe already; everything else is text."""

    html: str


Content = Markup | str | int | float | None


def text(value: Content) -> str:
    """HTML of one value: markup as it is, numbers and texts escaped, nothing as a dash."""
    if isinstance(value, Markup):
        return value.html
    if value is None:
        return MISSING
    return escape(f"{value:.4f}" if isinstance(value, float) else str(value))


def join(*parts: Content) -> Markup:
    """Several pieces one after the other."""
    return Markup("".join(text(part) for part in parts))


def element(tag: str, content: Content, css: str = "") -> Markup:
    """`<tag class=css>content</tag>`; `tag` and `css` are ours, `content` may be anybody's."""
    attribute = f' class="{css}"' if css else ""
    return Markup(f"<{tag}{attribute}>{text(content)}</{tag}>")


@dataclass(frozen=True)
class TableRow:
    """A line of a table: its name, its cells (content, class) and its own class."""

    name: Content
    cells: Sequence[tuple[Content, str]]
    css: str = ""


def table(head: Sequence[Content], rows: Iterable[TableRow], left: bool = False) -> Markup:
    """A table that scrolls sideways on a narrow screen; `left` sets the last column as running text."""
    last = len(head) - 1
    top = "".join(element("th", name, "left" if left and place == last else "").html for place, name in enumerate(head))
    body = "".join(
        f'<tr class="{row.css}"><th scope="row">{text(row.name)}</th>'
        + "".join(element("td", content, css).html for content, css in row.cells)
        + "</tr>"
        for row in rows
    )
    return Markup(f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')


def figure(light: Path, dark: Path | None, description: str, caption: str) -> Markup:
    """A picture inside the page, in the version that suits the reader's background.

    Args:
        light: SVG or PNG.
        dark: the same on dark ink; absent: the light one on a white sheet.
        description: what a reader who cannot see it is told.
        caption: text below it.
    """
    alt = f'alt="{escape(description, quote=True)}"'
    note = element("figcaption", caption).html
    if dark is None:
        return Markup(f'<figure class="sheet"><img src="{_embedded(light)}" {alt}>{note}</figure>')
    source = f'<source srcset="{_embedded(dark)}" media="(prefers-color-scheme: dark)">'
    return Markup(f'<figure><picture>{source}<img src="{_embedded(light)}" {alt}></picture>{note}</figure>')


def _embedded(path: Path) -> str:
    kind = {".svg": "image/svg+xml", ".png": "image/png"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def interval(value: float | None, low: float | None, high: float | None, top: float) -> Markup:
    """A dot on its interval, on a scale from 0 to `top` shared by the column."""
    if value is None or low is None or high is None or top <= 0:
        return Markup("")
    start, stop, dot = (100 * min(max(edge / top, 0.0), 1.0) for edge in (low, high, value))
    style = f"left:{start:.1f}%;width:{stop - start:.1f}%"
    return Markup(f'<span class="track"><i style="{style}"></i><b style="left:{dot:.1f}%"></b></span>')


def document(title: str, body: Markup) -> str:
    """The whole page with its style inside; it loads nothing from anywhere and runs no script."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style_sheet()}</style></head>\n<body>{body.html}</body></html>\n"
    )


def style_sheet() -> str:
    """The style of every page driftrec writes or serves."""
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")
