"""HTML from Python, escaped unless it is markup already."""

from __future__ import annotations

import html

_VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})
Attribute = str | int | float | bool | None


class Markup(str):
    """Text that is HTML; every other string is escaped where it becomes part of some."""

    __slots__ = ()


def element(name: str, /, *inside: str, **attributes: Attribute) -> Markup:
    """An element: strings inside are escaped, markup is kept. `class_` is `class`, `data_x` is `data-x`; None leaves one out.

    >>> element("p", "a < b", element("b", "!"), class_="x", hidden=True, title=None)
    '<p class="x" hidden>a &lt; b<b>!</b></p>'
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(*inside)}</{name}>")


def joined(*parts: str) -> Markup:
    """Parts one after the other, each escaped unless it is markup."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
