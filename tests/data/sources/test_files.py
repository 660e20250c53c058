"""The option `path`: which files are read, and which mistakes are reported."""

import pathlib
from typing import Any

import pytest
from ml_collections import ConfigDict

from narvl_jax.data.sources import files
from narvl_jax.errors import UserError


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  for name in ("a_train.tsv", "a_val.tsv", "b-2.tsv", "b-1.tsv", "odd[1].tsv"):
    (tmp_path / name).touch()
  return tmp_path


def names(path: Any, split: str = "train") -> list[str]:
  return [file.name for file in files.resolve(path, split, source="x")]


def test_forms(folder: pathlib.Path) -> None:
  assert names(f"{folder}/a_{{split}}.tsv", "val") == ["a_val.tsv"]
  assert names(f"{folder}/b-*.tsv") == ["b-1.tsv", "b-2.tsv"]
  pair = (f"{folder}/b-2.tsv", f"{folder}/a_{{split}}.tsv")
  assert names(pair) == names(list(pair)) == ["b-2.tsv", "a_train.tsv"]
  mapping = {"train": pair, "dev": f"{folder}/a_val.tsv"}
  assert names(mapping) == ["b-2.tsv", "a_train.tsv"]
  assert names(mapping, "dev") == ["a_val.tsv"]
  assert names(ConfigDict(mapping), "dev") == ["a_val.tsv"]
  # A name with brackets that is a file is not a pattern.
  assert names(f"{folder}/odd[1].tsv") == ["odd[1].tsv"]


def test_home(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("HOME", str(folder))
  assert names("~/b-1.tsv") == ["b-1.tsv"]


@pytest.mark.parametrize(
  ("path", "message"),
  [
    (None, r"x: options.path is None; .*NAME.options.path=FILE"),
    ("", r"x: options.path is ''; it must name a file"),
    ((), r"x: options.path is \(\)"),
    ((3,), r"x: options.path is \(3,\)"),
    ("http://b/f.tsv", r'"http://b/f.tsv": http:// cannot be read'),
    ("FOLDER", r'FOLDER" is a folder; .* such as .*FOLDER/\*'),
    (
      "FOLDER/a_{split}.tvs",
      r'no file ".*a_train.tvs" \(split "train"\)\. Did you mean "a_train.tsv"',
    ),
    (
      "FOLDER/q*",
      r"FOLDER\" has a_train.tsv, a_val.tsv, b-1.tsv, b-2.tsv, odd",
    ),
    ("FOLDER/no/x", r'There is no folder ".*FOLDER/no" either'),
    ({"trian": "f"}, r'no files for split "train"\. Did you mean "trian"'),
  ],
)
def test_mistakes(folder: pathlib.Path, path: Any, message: str) -> None:
  if isinstance(path, str):
    path = path.replace("FOLDER", str(folder))
  message = message.replace("FOLDER", str(folder))
  with pytest.raises(UserError, match=message) as error:
    files.resolve(path, "train", source="x")
  assert "\n" not in str(error.value)
