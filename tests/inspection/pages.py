"""Reads a page and checks that it is well-formed and needs no other file."""

import html.parser

HOSTILE = '<script>alert(1)</script>"&\x1b[31m'

_VOID = {"meta", "img", "br"}
_REFERENCES = ("src", "href", "xlink:href", "action", "data", "srcset")


class _Reader(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.open, self.text, self.images, self.styles = [], [], [], []

  def handle_starttag(self, tag, attrs):
    assert tag not in ("script", "link", "iframe", "object", "base")
    for name, value in attrs:
      assert not name.startswith("on")
      if name in _REFERENCES:
        assert value
        assert value.startswith("data:image/png;base64,") or value[0] == "#"
        self.images.append(value)
    if tag not in _VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    (self.styles if self.open[-1:] == ["style"] else self.text).append(data)


def read(page: str) -> tuple[str, list[str]]:
  """Returns the text of a page, spaces joined, and its pictures."""
  reader = _Reader()
  reader.feed(page)
  reader.close()
  assert reader.open == []
  style = "".join(reader.styles)
  assert "url(" not in style
  assert "@import" not in style
  assert "prefers-color-scheme: dark" in style
  assert "\x1b" not in page
  return " ".join(" ".join(reader.text).split()), reader.images
