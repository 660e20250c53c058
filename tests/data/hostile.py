"""Hostile rows for sources that read users' files."""

import base64
import json
import pathlib
from typing import Any

from narvl_jax.data.sources.jsonl import KEYS
from tests.data.sources import tsv_files

GOOD_TARGETS: dict[str, Any] = {
  "caption": "a dog",
  "vqa": "two dogs",
  "grounding": [1, 2, 11, 9],
  "entailment": "yes",
}
DEEP = 100_000
# What a JSON value may be instead of what is wanted.
WRONG_VALUES: tuple[Any, ...] = (
  *(0, -1, 1.5, True, False, "", " ", "x", [], {}, [[]], [None], {"a": 1}),
  *({"a": None}, {"": 1}, [0, 0, 0, 0], [1, 2, 3, 4, 5], ["1", "2", "3", "x"]),
  *({"yes": "1"}, 1e308, -1e308, float("inf"), float("nan"), 10**400),
  *([10**400] * 4, [0, 0, 1e308, 1e308], {"two": 10**400}, "\0", "\ud83d"),
)
# Strings that any field may contain.
NASTY_TEXTS = (
  "\ud83d",
  "\udfff two",
  "\0",
  "\x1b]0;owned\x07",
  "\u202etwo\u2069",
  "\ufeff",
  "two\nlines\r\n\u2028",
  "\x85\x9b31m",
  "x" * 20_000,
  "word " * 4_000,
  "&&|!+\t",
  "[red]two[/red] $x^2$ %s {0}",
)


_WRONG_CELLS = (
  *(b"", b" ", b"1e400", b"nan", b"-1", b"\x1b]0;owned\x07", b"&&"),
  *(b"|!+", b"nan|!+a", b"1,2,nan,4", b"1,2,1e400,4", b"1|!+&&"),
)


def good_row(task: str) -> dict[str, Any]:
  """Returns a row that every task of this name can use."""
  row = {"image": "good.jpg", "target": GOOD_TARGETS[task]}
  return row if task == "caption" else {**row, "prompt": "how many?"}


def jsonl_rows(task: str) -> dict[str, bytes]:
  """Returns name -> a row without its end."""
  good = good_row(task)
  text = json.dumps(good)
  rows: dict[str, bytes] = {
    "deep list": b'{"target": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep object": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep and cut": b"[" * DEEP,
    "deep, but not too deep": b'{"target": ' + b"[" * 400 + b"]" * 400 + b"}",
    "cut off": text[:-5].encode(),
    "number of 5,000 digits": b'{"target": ' + b"9" * 5000 + b"}",
    "NUL bytes": text.encode() + b"\0",
    "no UTF-8": b'{"image": "good.jpg", "prompt": "\xff\xfe"}',
    "half of UTF-8": text.encode()[:-2] + b"\xe2\x82",
    "UTF-16": text.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + text.encode(),
    "empty": b"",
    "spaces": b"  \t ",
    "literal": b"null",
    "list": b"[1, 2]",
    "text": b'"two"',
    "no JSON": b"NaN Infinity",
    "single quotes": b"{'image': 'good.jpg'}",
    "two objects": text.encode() * 2,
    "key twice": text[:-1].encode() + b', "target": 5, "target": [5]}',
    "long": json.dumps({**good, "prompt": "x" * 500_000}).encode(),
    "long key": json.dumps({**good, "k" * 500_000: 1}).encode(),
    "key with an escape": json.dumps({**good, "\x1b]0;owned\x07": 1}).encode(),
    "key of half a pair": json.dumps({**good, "\ud83d": 1}).encode(),
  }
  names = ["~nosuchuser/x.png", "~", "~/", "\0", "x" * 5000, ".", "\ud83d"]
  for name in (*names, "../" * 1000 + "x", "http://127.0.0.1/x", "bad.jpg"):
    rows[f"image {name[:20]!r}"] = json.dumps({**good, "image": name}).encode()
  for key in KEYS:
    for value in (*WRONG_VALUES, *NASTY_TEXTS):
      name = f"{key} = {repr(value)[:40]} ({len(rows)})"
      rows[name] = json.dumps({**good, key: value}).encode()
  return rows


def write_jsonl(folder: pathlib.Path, task: str, good: int) -> pathlib.Path:
  """Writes good rows, then as many hostile ones, and pictures."""
  (folder / "good.jpg").write_bytes(tsv_files.picture(3))
  (folder / "bad.jpg").write_bytes(tsv_files.picture(3)[:-200])
  lines = [json.dumps(good_row(task)).encode()] * good
  path = folder / f"{task}.jsonl"
  path.write_bytes(b"\n".join([*lines, *jsonl_rows(task).values()]))
  return path


def tsv_rows(task: str) -> dict[str, bytes]:
  """Returns name -> a row without its end."""
  good = tsv_files.row(task, 1)
  columns = good.count(b"\t") + 1
  rows = {
    "empty": b"",
    "tabs": b"\t" * (columns - 1),
    "too few": b"\t".join(good.split(b"\t")[:-1]),
    "too many": good + b"\tx",
    "NUL bytes": b"\0" + good,
    "no UTF-8": good.replace(b"dog", b"d\xffg"),
    "half a pair": good.replace(b"dog", b"d\xed\xa0\xbdg"),
    "byte order mark": b"\xef\xbb\xbf" + good,
    "carriage returns": good.replace(b"dog", b"\rd\rg\r"),
    "long": good.replace(b"dog", b"dog " * 200_000),
    "long number": good.replace(b"0.9", b"9" * 5000),
  }
  for column in range(columns):
    for value in _WRONG_CELLS:
      cells = good.split(b"\t")
      cells[column] = value
      rows[f"column {column} = {value!r}"] = b"\t".join(cells)
  for name, data in (
    ("no picture", b"two"),
    ("cut", tsv_files.picture(3)[:90]),
  ):
    picture = base64.b64encode(tsv_files.picture(1))
    assert picture in good
    rows[name] = good.replace(picture, base64.b64encode(data))
  return rows


def write_tsv(folder: pathlib.Path, task: str, good: int) -> pathlib.Path:
  """Writes good rows, then as many hostile ones."""
  lines = [tsv_files.row(task, 2)] * good
  path = folder / f"{task}.tsv"
  path.write_bytes(b"\n".join([*lines, *tsv_rows(task).values()]))
  return path
