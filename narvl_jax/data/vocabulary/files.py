"""Reads the files of tokenizers."""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers

from narvl_jax.data.vocabulary import training as vocabulary_training
from narvl_jax.errors import UserError
from narvl_jax.files.regular import read_regular
from narvl_jax.terminal.text import warn

PathLike = str | os.PathLike[str]

_ADVICE = "set --config.vocabulary.path"
_FOLDER = "set --config.vocabulary.path to the folder of the official files"
# Largest fraction of tokens that no merge makes (specials, fillers).
_MAX_UNMERGED = 0.001


_FILLER = re.compile(r"madeupword\d+")
_RESERVED = re.compile(r"<(s|pad|/s|unk|mask|(code|bin)_\d+|<BLANK>)>")


def read_official(
  dict_path: PathLike, encoder_path: PathLike, bpe_path: PathLike
) -> tuple[tokenizers.Tokenizer, list[str]]:
  """Returns tokenizer and base tokens of the reference's files."""
  encoder = _read_token_ids(encoder_path)
  base = _read_dictionary(dict_path, encoder, encoder_path)
  return _byte_level_bpe(encoder, bpe_path), base


def read_huggingface(
  vocab_path: PathLike, merges_path: PathLike
) -> tuple[tokenizers.Tokenizer, list[str]]:
  """Returns tokenizer and base tokens of a byte-level BPE tokenizer.

  Base tokens keep the order of `vocab.json`, without the specials, codes and
  bins in it.
  """
  vocab = _read_token_ids(vocab_path)
  base = [
    token
    for token in sorted(vocab, key=vocab.__getitem__)
    if not _RESERVED.fullmatch(token)
  ]
  # As in the official files, fillers have ids but are no tokens.
  tokens = {
    token: index
    for token, index in vocab.items()
    if not _FILLER.fullmatch(token)
  }
  return _byte_level_bpe(tokens, merges_path), base


# Source of a vocabulary -> its files, and the function that reads them.
NAMES = {
  "official": ("dict.txt", "encoder.json", "vocab.bpe"),
  "huggingface": ("vocab.json", "merges.txt"),
}
READERS: dict[str, Callable[..., tuple[tokenizers.Tokenizer, list[str]]]] = {
  "official": read_official,
  "huggingface": read_huggingface,
}


def _read_dictionary(
  path: PathLike, encoder: Mapping[str, int], encoder_path: PathLike
) -> list[str]:
  """Returns the tokens of the reference's `dict.txt` in its order.

  Args:
    path: `dict.txt` of lines "SYMBOL COUNT". Symbols are ids of `encoder`;
      other names (the fillers) are kept.

  Raises:
    UserError: the file cannot be read, is cut off or has another content.
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


def _byte_level_bpe(
  vocab: Mapping[str, int], merges_path: PathLike
) -> tokenizers.Tokenizer:
  """Returns GPT-2's tokenizer with `vocab` and the merges of a file.

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
  vocab: Mapping[str, int], merges: list[tuple[str, ...]], merges_path: PathLike
) -> None:
  """Raises `UserError` if merges are missing, which would split words."""
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


def _read_token_ids(path: PathLike) -> dict[str, int]:
  """Returns token -> id of an `encoder.json` or `vocab.json`.

  Raises:
    UserError: the file cannot be read or has another content.
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
  """Returns the text of a file; raises `UserError` if it cannot be read."""
  try:
    text = read_regular(path).decode("utf-8")
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(
      f"cannot read the vocabulary file {path}: {e}; {advice}"
    ) from e
  # Universal newlines.
  return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_object(path: PathLike, advice: str = _ADVICE) -> dict[str, Any]:
  """Returns the JSON object in a file; raises `UserError` if there is none."""
  try:
    content = json.loads(read_text(path, advice))
  except (ValueError, RecursionError) as e:
    raise UserError(f"{path} is not JSON: {e}; {advice}") from e
  if not isinstance(content, dict):
    raise UserError(
      f"{path} contains a {type(content).__name__}, not a JSON object; {advice}"
    )
  return content
