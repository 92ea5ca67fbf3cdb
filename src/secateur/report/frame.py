"""The frame of a page: one self-contained file, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from secateur.report.style import STYLE


def html_page(title: str, lead: str, sections: Iterable[str], style: str = "") -> str:
    """The whole document; title and lead are text, sections are HTML, and empty ones are left out.

    >>> html_page("A & B", "Two runs.", ["", "<p>x</p>"]).count("<p>x</p>")
    1
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *content: str) -> str:
    """A heading, which is text, over HTML."""
    return f"<section><h2>{escape(heading)}</h2>{''.join(content)}</section>"
