"""Mistakes in a conversion: targets, sizes, vocabularies."""

import pathlib
from typing import Any

import pytest

from narvl_jax.errors import UserError
from narvl_jax.interop import Options, transfer
from narvl_jax.interop.run_folder import VocabularyFiles
from tests.interop.states import COUNTS, fitting_config


def test_vocabulary_that_does_not_fit(
  tmp_path: pathlib.Path, official: pathlib.Path, words: pathlib.Path
) -> None:
  run = tmp_path / "run"
  with pytest.raises(
    UserError, match="has 51 ids with 2 codes and 5 bins, the weights have 50"
  ):
    transfer.import_official(
      official, run, vocabulary=VocabularyFiles(words, 2, 5)
    )
  with pytest.raises(
    UserError, match=r"contains neither dict.txt, .* nor vocab"
  ):
    transfer.import_official(
      official, run, vocabulary=VocabularyFiles(tmp_path)
    )
  with pytest.raises(UserError, match=r"^--vocabulary=\S+none: there is no su"):
    transfer.import_official(
      official, run, vocabulary=VocabularyFiles(tmp_path / "none")
    )
  for name, text, message in (
    ("encoder.json", "{", r"encoder.json is not JSON.*set --vocabulary$"),
    ("encoder.json", '{"<s>": 1}', r"vocab.json and no .*set --vocabulary=FOL"),
    ("dict.txt", "a\n", r"set --vocabulary to the folder of the official"),
  ):
    before = (words / name).read_text()
    (words / name).write_text(text)
    with pytest.raises(UserError, match=message):
      transfer.import_official(
        official, run, vocabulary=VocabularyFiles(words, **COUNTS)
      )
    (words / name).write_text(before)
  with pytest.raises(UserError, match=r"num_bins is -1; .* set --num_bins$"):
    transfer.import_official(
      official, run, vocabulary=VocabularyFiles(words, 2, -1)
    )
  assert not run.exists()


def test_target_that_is_not_empty(
  tmp_path: pathlib.Path, official: pathlib.Path
) -> None:
  with pytest.raises(UserError, match="is not empty; use a folder that is new"):
    transfer.import_official(official, tmp_path)
  with pytest.raises(UserError, match=r"^--to=\S+ is a file, not a folder"):
    transfer.import_official(official, official)
  with pytest.raises(UserError, match=r"^--to=\S+/y is below \S+x.pt, a file"):
    transfer.import_official(official, official / "y")


def test_targets_that_cannot_be_written(
  tmp_path: pathlib.Path,
  official: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  run = tmp_path / "run"
  transfer.import_official(official, run)
  with pytest.raises(UserError, match=r"^--to=\S+/y.pt: \S+x.pt is a file"):
    transfer.export_official(run, official / "y.pt")
  link = tmp_path / "link.pt"
  link.symlink_to(tmp_path / "nowhere")
  with pytest.raises(UserError, match=r"link.pt exists; name a new file"):
    transfer.export_official(run, link)
  before = set(tmp_path.iterdir())

  def fail(*_: Any, **__: Any) -> None:
    raise FileNotFoundError(2, "No such file or directory")

  # Like /proc, which is not writable despite its permissions.
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "mkdir", fail)
    message = "^--to=.* cannot be written: No such file or directory; use"
    with pytest.raises(UserError, match=message):
      transfer.export_official(run, tmp_path / "y.pt")
    with pytest.raises(UserError, match=message):
      transfer.import_official(official, tmp_path / "new")
  assert set(tmp_path.iterdir()) == before


def test_config_of_another_size(
  tmp_path: pathlib.Path, official: pathlib.Path
) -> None:
  config = fitting_config()
  config.model.size = "tiny"
  with pytest.raises(
    UserError,
    match=r"--config is of size tiny \(D=256\), but --from=\S+x.pt of size"
    r" micro \(D=12\); set --config.model.size=micro",
  ):
    transfer.import_official(official, tmp_path / "run", config=config)
  assert not (tmp_path / "run").exists()


def test_queries_of_config_and_flag(
  tmp_path: pathlib.Path, official: pathlib.Path
) -> None:
  config = fitting_config()
  config.model.num_queries = 6
  with pytest.raises(
    UserError,
    match=r"--num_queries=5, but --config has model.num_queries=6; leave",
  ):
    transfer.import_official(
      official, tmp_path / "a", config=config, options=Options(num_queries=5)
    )
  for name, options in (("a", None), ("b", Options(num_queries=6))):
    report = transfer.import_official(
      official, tmp_path / name, config=config, options=options
    )
    assert report["model"]["num_queries"] == 6


def test_nothing_is_left_of_a_failure(
  tmp_path: pathlib.Path,
  official: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  before = set(tmp_path.iterdir())

  def fail(*_: Any) -> None:
    raise OSError("disk full")

  monkeypatch.setattr(transfer.run_folder, "write_torch", fail)
  with pytest.raises(OSError, match="disk full"):
    transfer.import_official(official, tmp_path / "run")
  assert set(tmp_path.iterdir()) == before


def test_runs_that_are_none(
  tmp_path: pathlib.Path, official: pathlib.Path
) -> None:
  with pytest.raises(UserError, match=r"is no run: .* --to=FOLDER"):
    transfer.export_official(official, tmp_path / "y.pt")
  assert not (tmp_path / "y.pt").exists()
