"""Files that several tests convert."""

import json
import pathlib

import numpy as np
import pytest

from narvl_jax.interop.torch_write import write_torch
from tests.interop.states import BASE, narvl_state


@pytest.fixture
def official(tmp_path: pathlib.Path) -> pathlib.Path:
  """A NARVL in half precision."""
  write_torch(tmp_path / "x.pt", {"model": narvl_state(np.float16)})
  return tmp_path / "x.pt"


@pytest.fixture
def words(tmp_path: pathlib.Path) -> pathlib.Path:
  """The files of a vocabulary of 50 ids."""
  folder = tmp_path / "words"
  folder.mkdir()
  letters = [chr(ord("a") + i) for i in range(26)] + list("ABCDEFGHIJKL")
  assert len(letters) == BASE
  encoder = {letter: i for i, letter in enumerate(letters)}
  (folder / "encoder.json").write_text(json.dumps(encoder))
  (folder / "vocab.bpe").write_text("#version: 0.2\n")
  lines = "".join(f"{i} 1\n" for i in range(BASE))
  (folder / "dict.txt").write_text(lines)
  return folder
