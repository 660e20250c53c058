"""The files that tokenizers come in."""

import json
import os
from collections.abc import Mapping
from typing import Any

import tokenizers

from narvl_jax.data.vocabulary import training as vocabulary_training
from narvl_jax.errors import UserError
from narvl_jax.files.regular import read_regular
from narvl_jax.terminal.text import warn

PathLike = str | os.PathLike[str]

_ADVICE = "set --config.vocabulary.path"
_FOLDER = "set --config.vocabulary.path to the folder of the official files"
# Tokens that no merge makes: specials and fillers are few.
_MAX_UNMERGED = 0.001


def read_dictionary(
  path: PathLike, encoder: Mapping[str, int], encoder_path: PathLike
) -> list[str]:
  """Returns the tokens of the reference's `dict.txt` in its order.

  Args:
    path: of `dict.txt`, lines "SYMBOL COUNT"; symbols are ids of `encoder`,
      other names (the fillers) are kept.
    encoder: token -> id.
    encoder_path: where `encoder` is from, for messages.

  Raises:
    UserError: the file cannot be read, is cut off or holds something else.
  """
  if "<s>" in encoder:
    raise UserError(
      f'{encoder_path} lists "<s>", so it is a vocab.json and no encoder.json;'
      " set --config.vocabulary.source=huggingface"
    )
  text = read_text(path)
  token_of_id = {str(index): token for token, index in encoder.items()}
  base: dict[str, None] = {}
  for number, line in enumerate(text.splitlines(), 1):
    symbol, _, count = line.rpartition(" ")
    if not symbol or not count.isdigit():
      raise UserError(
        f'{path} line {number} is "{line[:40]}", not "SYMBOL COUNT"; {_FOLDER}'
      )
    token = token_of_id.get(symbol, symbol)
    if token in base:
      raise UserError(
        f'{path} line {number} lists "{symbol}" a second time; {_FOLDER}'
      )
    base[token] = None
  if not text.endswith("\n"):
    raise UserError(
      f"{path} ends in the middle of line {len(base)}, so it may be cut off;"
      f" copy it again, or end it with a newline; {_FOLDER}"
    )
  known = sum(token in encoder for token in base)
  if known < len(encoder):
    warn(
      f"{path} has ids for {known} of the {len(encoder)} tokens of"
      f" {encoder_path}; the others become <unk>"
    )
  return list(base)


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
  _check_complete(vocab, merges, merges_path)
  try:
    return vocabulary_training.byte_level(vocab, merges)
  except Exception as e:  # The library raises plain Exception.
    raise UserError(f"{merges_path} does not fit its vocabulary: {e}") from e


def _check_complete(
  vocab: Mapping[str, int],
  merges: list[tuple[str, ...]],
  merges_path: PathLike,
) -> None:
  """Fewer merges would split words without any sign of it."""
  made = {left + right for left, right in merges}
  longer = [token for token in vocab if len(token) > 1 and token[0] != "<"]
  missing = [token for token in longer if token not in made]
  if len(missing) > 1 + _MAX_UNMERGED * len(longer):
    raise UserError(
      f"{merges_path} has {len(merges)} merges, which make only"
      f" {len(longer) - len(missing)} of the {len(longer)} tokens of its"
      f' vocabulary, not "{missing[-1]}" for one; it is cut off or of another'
      " tokenizer: copy it again"
    )


def read_token_ids(path: PathLike) -> dict[str, int]:
  """Returns token -> id of an `encoder.json` or `vocab.json`.

  Raises:
    UserError: the file cannot be read or holds something else.
  """
  content = read_json_object(path)
  for token, index in content.items():
    if type(index) is not int:
      raise UserError(
        f'{path} has {str(index)[:40]!r} for "{token[:40]}", not the number of'
        " a token; set --config.vocabulary.path to the folder of the"
        " tokenizer's files"
      )
  return content


def read_text(path: PathLike, advice: str = _ADVICE) -> str:
  """Returns the text of a file.

  Raises:
    UserError: it cannot be read.
  """
  try:
    text = read_regular(path).decode("utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(
      f"cannot read the vocabulary file {path}: {e}; {advice}"
    ) from e
  # As Python reads text files.
  return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_object(path: PathLike, advice: str = _ADVICE) -> dict[str, Any]:
  """Returns the JSON object in a file.

  Raises:
    UserError: it cannot be read or holds something else.
  """
  try:
    content = json.loads(read_text(path, advice))
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path} is not JSON: {e}; {advice}") from e
  if not isinstance(content, dict):
    raise UserError(
      f"{path} holds a {type(content).__name__}, not a JSON object; {advice}"
    )
  return content
