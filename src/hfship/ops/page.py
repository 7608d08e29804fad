# SPDX-License-Identifier: Apache-2.0
"""Pages for people, of the mirror and of a site. Pure.

Promises: a page that needs nothing else, for networks that lead nowhere: no script, no font, no
picture; what comes from names is text in it, and nothing more.
"""

from __future__ import annotations

import html
from typing import Sequence

from hfship import __version__

# For the browser: whatever a name smuggles in, it loads and runs nothing.
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2rem }
p.about { color: #57606a; margin-top: .25rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #d8dee4;
  vertical-align: top }
th { font-weight: 600; white-space: nowrap } .number { text-align: right; white-space: nowrap }
td.name { font-weight: 600; overflow-wrap: anywhere; min-width: 12rem }
code, pre { font: 14px/1.5 ui-monospace, monospace }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; border-radius: 6px }
@media (prefers-color-scheme: dark) { body { color: #e6edf3; background: #0d1117 }
  p.about { color: #8d96a0 } th, td { border-color: #30363d } pre { background: #161b22 } }
"""


def wants_page(accept: str) -> bool:
    """Does an Accept header ask for a page? Browsers name text/html, programs take anything.

    >>> wants_page("text/html,application/xhtml+xml,*/*;q=0.8"), wants_page("*/*"), wants_page("")
    (True, False, False)
    """
    kinds = [kind.partition(";")[0].strip() for kind in accept.lower().split(",")]
    return "text/html" in kinds


def page_text(title: str, about: str, parts: Sequence[str]) -> str:
    """A whole page, of a title, a line about it, and parts that are HTML."""
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{as_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{as_text(title)}</h1>",
        f'<p class="about">{as_text(about)}</p>',
        *parts,
        f'<p class="about">hfship {as_text(__version__)}. Programs get this as JSON.</p>',
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def as_text(value: str) -> str:
    """A value as text of the page, whatever is in it."""
    return html.escape(value.encode("utf-8", "replace").decode("utf-8"))
