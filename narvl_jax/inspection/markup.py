"""HTML pages in one file: no scripts, no links to other resources.

Functions that take texts escape them. `Markup` is what they return; a plain
`str` is never taken for markup.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from PIL import Image

from narvl_jax.terminal.text import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #656d76;
  --paper: #ffffff; --cell: #f3f4f6; --line: #d0d7de; --mark: 9, 105, 218; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3;
  --faint: #9198a1; --paper: #0d1117; --cell: #1b222b; --line: #3d444d;
  --mark: 76, 154, 255; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); margin: 2rem auto; padding: 0 1rem;
  max-width: 76rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem;
  border-bottom: 1px solid var(--line); }
p { margin: .4rem 0; overflow-wrap: anywhere; }
.faint { color: var(--faint); }
.blank { opacity: .4; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  margin: .5rem 0; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; background: var(--cell); }
td { overflow-wrap: anywhere; max-width: 36rem; }
.cells td, .cells th { text-align: center; min-width: 4.5rem; }
.cells th:first-child { text-align: left; min-width: 7rem; }
.word { background: rgba(var(--mark), .25); font-weight: 600;
  border-left: 3px solid var(--paper); }
img { max-width: 100%; }
.pixels { image-rendering: pixelated; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; max-width: 380px; } .legend { font-size: .8rem; }
.key { display: inline-block; margin-right: .8rem; white-space: nowrap; }
h3, .task { font-size: 1rem; font-weight: 600; margin: 1rem 0 .3rem; }
figcaption { font-weight: 600; font-size: .9rem; }
svg text { fill: var(--ink); font-size: 11px; }
svg .axis { stroke: var(--line); }
"""


class Markup(str):
  """HTML that may be put into a page as it is."""

  __slots__ = ()


def text(value: object) -> Markup:
  """Returns any value as escaped text; `Markup` is returned unchanged."""
  if isinstance(value, Markup):
    return value
  return Markup(html.escape(escape(str(value), keep="\n\t")))


def element(tag: str, *content: object, **attributes: object) -> Markup:
  """Returns an element; `class_` is the attribute class."""
  shown = "".join(
    f' {name.rstrip("_").replace("_", "-")}="{text(value)}"'
    for name, value in attributes.items()
  )
  inner = "".join(map(text, content))
  return Markup(f"<{tag}{shown}>{inner}</{tag}>")


def join(parts: Iterable[object]) -> Markup:
  """Returns parts one after the other."""
  return Markup("".join(map(text, parts)))


def table(
  rows: Iterable[Sequence[object]], head: Sequence[object] = ()
) -> Markup:
  """Returns a table, with a row of column names if `head` is given."""
  parts = []
  if head:
    parts.append(element("tr", *(element("th", x) for x in head)))
  parts += [element("tr", *(element("td", x) for x in row)) for row in rows]
  return element("div", element("table", *parts), class_="scroll")


def section(title: str, *content: object) -> Markup:
  """Returns a heading and its content."""
  return element("section", element("h2", title), *content)


def missing(why: str) -> Markup:
  """Returns a sentence in place of content that there is not."""
  return element("p", why, class_="faint")


def png(data: bytes, alt: str, **attributes: object) -> Markup:
  """Returns a picture that is part of the page."""
  source = "data:image/png;base64," + base64.b64encode(data).decode()
  others = "".join(f' {k}="{text(v)}"' for k, v in attributes.items())
  kind = others.replace("class_=", "class=")
  return Markup(f'<img src="{source}" alt="{text(alt)}"{kind}>')


def picture(image: Image.Image, alt: str, **attributes: object) -> Markup:
  """Returns a picture as `png` does."""
  data = io.BytesIO()
  image.save(data, format="PNG")
  return png(data.getvalue(), alt, **attributes)


def page(title: str, *content: object) -> str:
  """Returns a whole document."""
  head = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n"
  )
  return head + element("body", element("h1", title), *content) + "</html>\n"
