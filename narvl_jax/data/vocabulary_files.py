"""The files that tokenizers come in."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers

from narvl_jax.data import vocabulary_training
from narvl_jax.errors import UserError

PathLike = str | os.PathLike[str]


def byte_level_bpe(
  vocab: Mapping[str, int], merges_path: PathLike
) -> tokenizers.Tokenizer:
  """Returns GPT-2's tokenizer over `vocab` with the merges of a file.

  Raises:
    UserError: the file cannot be read or does not fit `vocab`.
  """
  merges = []
  for number, line in enumerate(read_text(merges_path).split("\n"), 1):
    if not line or line.startswith("#version"):
      continue
    pair = tuple(line.split(" "))
    if len(pair) != 2:
      raise UserError(
        f'{merges_path} line {number} is "{line[:40]}", not two tokens; set'
        " --config.vocabulary.path to the folder of the tokenizer's files"
      )
    merges.append(pair)
  try:
    return vocabulary_training.byte_level(vocab, merges)
  except Exception as e:  # The library raises plain Exception.
    raise UserError(f"{merges_path} does not fit its vocabulary: {e}") from e


def read_text(path: PathLike) -> str:
  """Returns the text of a file.

  Raises:
    UserError: it cannot be read.
  """
  try:
    return pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(
      f"cannot read the vocabulary file {path}: {e}; set"
      " --config.vocabulary.path"
    ) from e


def read_json_object(path: PathLike) -> dict[str, Any]:
  """Returns the JSON object in a file.

  Raises:
    UserError: it cannot be read or holds something else.
  """
  try:
    content = json.loads(read_text(path))
  except json.JSONDecodeError as e:
    raise UserError(
      f"{path} is not JSON: {e}; set --config.vocabulary.path"
    ) from e
  if not isinstance(content, dict):
    raise UserError(
      f"{path} holds a {type(content).__name__}, not a JSON object; set"
      " --config.vocabulary.path"
    )
  return content
