"""Opening sources by name and by what a command line names."""

import pathlib

import pytest

from narvl_jax.data import sources
from narvl_jax.errors import UserError
from tests.data.number_source import NumberSource


@pytest.mark.parametrize(
  ("spec", "expected"),
  [
    ("shapes", ("shapes", {})),
    ("tfds:ref_coco", ("tfds", {"name": "ref_coco"})),
    ("data/vqa_{split}.tsv", ("ofa_tsv", {"path": "data/vqa_{split}.tsv"})),
    ("own.jsonl", ("jsonl", {"path": "own.jsonl"})),
  ],
)
def test_spec(spec: str, expected: tuple[str, dict[str, str]]) -> None:
  assert sources.parse_spec(spec) == expected


def test_folder_with_manifest_is_array_record(tmp_path: pathlib.Path) -> None:
  (tmp_path / sources.MANIFEST).write_text("{}")
  spec = str(tmp_path)
  assert sources.parse_spec(spec) == ("array_record", {"path": spec})


def test_spec_that_is_nothing(tmp_path: pathlib.Path) -> None:
  with pytest.raises(UserError, match=r'"shape" is no source: .*"shapes"'):
    sources.parse_spec("shape")
  with pytest.raises(UserError, match=r"is a folder without manifest\.json"):
    sources.parse_spec(str(tmp_path))


def test_open_source_passes_options() -> None:
  source = sources.open_source("shapes", task="vqa", split="test")
  named = sources.load_source("shapes", task="vqa", split="test")
  assert source[3].id == named[3].id == "shapes-test-3"
  with pytest.raises(UserError, match='unknown option "sice"'):
    sources.open_source("shapes", task="vqa", sice=3)


def test_locate() -> None:
  class Located(NumberSource):
    def locate(self, index: int) -> str:
      return f"file row {index + 1}"

  assert sources.locate(NumberSource("vqa", 3), 2) == "record 2"  # pyright: ignore
  assert sources.locate(Located("vqa", 3), 2) == "file row 3"  # pyright: ignore
