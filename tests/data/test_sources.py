"""Opening sources by name and by what a command line names."""

import pathlib
from typing import Any

import pytest

from narvl_jax.data import sources
from narvl_jax.data.sources.subset import Subset, spread
from narvl_jax.errors import UserError
from tests.data.number_source import ListSource, NumberSource


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
  with pytest.raises(UserError, match=r'"shape" is not a source: .*"shapes"'):
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


@pytest.mark.parametrize(
  ("suffix", "command"),
  [
    (".gz", "gunzip -k"),
    (".bz2", "bunzip2 -k"),
    (".xz", "unxz -k"),
    (".zst", "unzstd"),
    (".zip", "unzip"),
  ],
)
def test_compressed_files_are_to_be_unpacked(
  tmp_path: pathlib.Path, suffix: str, command: str
) -> None:
  path = tmp_path / f"vqa.tsv{suffix}"
  path.write_bytes(b"")
  message = (
    rf"vqa.tsv{suffix}\" is compressed; records are read in any order, so"
    rf" unpack it first: {command} {path}, and give {path.with_suffix('')}$"
  )
  with pytest.raises(UserError, match=message):
    sources.open_source(str(path), task="vqa")
  with pytest.raises(UserError, match=message):
    sources.load_source("ofa_tsv", task="vqa", split="train", path=str(path))
  pattern = str(tmp_path / "*")
  with pytest.raises(UserError, match=message):
    sources.load_source("ofa_tsv", task="vqa", split="train", path=pattern)


def test_a_split_that_changes_nothing() -> None:
  assert sources.unused_split("a.tsv", "val") == (
    '--split=val changes nothing: "a.tsv" is one file for all splits; write'
    " {split} where its name has the split"
  )
  assert sources.unused_split("a.jsonl", "val")
  for spec, split in (
    ("a.tsv", ""),
    ("a_{split}.tsv", "val"),
    ("shapes", "test"),
    ("tfds:coco", "val"),
  ):
    assert sources.unused_split(spec, split) == ""


@pytest.mark.parametrize("limit", [None, 1, 3, 10, 11])
def test_spread_indices_are_distinct_and_in_range(limit):
  indices = spread(10, limit)
  assert len(indices) == min(10, 10 if limit is None else limit)
  assert len(set(indices)) == len(indices)
  assert all(0 <= i < 10 for i in indices)


def test_subset_has_the_places_of_its_source():
  source: Any = ListSource("abcdefghi")
  some = Subset(source, spread(9, 3))
  assert list(some) == ["a", "d", "g"]
  assert sources.locate(some, 2) == "list.tsv row 7"
