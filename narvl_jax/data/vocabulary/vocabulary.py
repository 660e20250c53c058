"""From text to ids and back.

The order of ids is that of the reference model:

| ids              | symbols                                             |
| ---------------- | --------------------------------------------------- |
| 0 1 2 3          | `<s>` `<pad>` `</s>` `<unk>`                        |
| 4 ...            | base symbols: byte-level BPE tokens                 |
| mask_id          | `<mask>`                                            |
| code_start ...   | `<code_0>` ... , image codes                        |
| bin_start ...    | `<bin_0>` ... , coordinates                         |
| size - 1         | the blank of the Query-CTC loss                     |
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from narvl_jax.data.answer_text import checked_text
from narvl_jax.data.vocabulary import files, training
from narvl_jax.errors import UserError
from narvl_jax.files.disk import write_text
from narvl_jax.files.stores import as_path

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
BLANK = "<<BLANK>>"
# Ids of the official vocabulary without image codes and bins: specials, lines
# of `dict.txt`, mask and blank.
OFFICIAL_FIXED_IDS = len(SPECIALS) + 50_260 + 2
_TOKENIZER_FILE = "tokenizer.json"
_SYMBOLS_FILE = "vocabulary.json"
_FORMAT = 1
# Texts whose ids are kept, because captions and questions repeat.
_CACHE_SIZE = 1 << 12


class Vocabulary:
  """Maps text to ids and ids to text; immutable.

  Attributes:
    size: number of ids, with the blank.
    bos_id: 0. pad_id: 1. eos_id: 2. unk_id: 3.
    mask_id: id of `<mask>`.
    num_codes: number of image codes. code_start: id of the first one.
    num_bins: number of coordinate bins. bin_start: id of the first one.
    blank_id: size - 1.
    forbidden: bool [size], ids that no answer contains: bos, pad, unk, mask,
      codes and the fillers of the official dictionary.
  """

  bos_id, pad_id, eos_id, unk_id = range(4)

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    base: Sequence[str],
    *,
    num_codes: int,
    num_bins: int,
    expansions: Mapping[str, Sequence[int]] | None = None,
  ) -> None:
    """Builds the table of ids; see also `from_files`, `train` and `load`.

    Args:
      tokenizer: byte-level BPE; its ids are internal.
      base: tokens with an id, in the order of ids. A name that is no token of
        `tokenizer` is an unused filler.
      expansions: ids of a token that is not in `base`. A token without either
        becomes unk.
    """
    for name, value in (("num_codes", num_codes), ("num_bins", num_bins)):
      if value < 0:
        raise UserError(
          f"{name} is {value}; it must be 0 or more: set"
          f" --config.vocabulary.{name}"
        )
    self._tokenizer = tokenizer
    self._base = tuple(base)
    self._expansions = {k: list(v) for k, v in (expansions or {}).items()}
    self.num_codes = num_codes
    self.num_bins = num_bins
    self.mask_id = len(SPECIALS) + len(self._base)
    self.code_start = self.mask_id + 1
    self.bin_start = self.code_start + num_codes
    self.blank_id = self.bin_start + num_bins
    self.size = self.blank_id + 1
    first = len(SPECIALS)
    self._symbols = (
      *SPECIALS,
      *self._base,
      MASK,
      *(f"<code_{i}>" for i in range(num_codes)),
      *(f"<bin_{i}>" for i in range(num_bins)),
      BLANK,
    )
    tokens = tokenizer.get_vocab(with_added_tokens=False)
    known = {name: [first + i] for i, name in enumerate(self._base)}
    known = {**self._expansions, **known}
    self._ids_of_token = {
      token_id: known.get(token) or [self.unk_id]
      for token, token_id in tokens.items()
    }
    fillers = [
      first + i for i, name in enumerate(self._base) if name not in tokens
    ]
    dropped = {self.bos_id, self.pad_id, self.eos_id, self.blank_id, *fillers}
    self._pieces = [
      None if i in dropped else symbol for i, symbol in enumerate(self._symbols)
    ]
    self.forbidden = np.zeros(self.size, bool)
    self.forbidden[[self.bos_id, self.pad_id, self.unk_id, self.mask_id]] = True
    self.forbidden[self.code_start : self.bin_start] = True
    self.forbidden[fillers] = True
    self.forbidden.setflags(write=False)
    self._cache: dict[str, list[int]] = {}

  @classmethod
  def from_files(
    cls,
    source: str,
    paths: Sequence[files.PathLike],
    num_codes: int = 8192,
    num_bins: int = 1000,
  ) -> "Vocabulary":
    """Reads the files of a tokenizer.

    Args:
      source: "official" (the reference), or "huggingface" (any byte-level BPE).
      paths: its files, in the order of `files.NAMES`.

    Raises:
      UserError: a file is missing or has another content.
    """
    tokenizer, base = files.READERS[source](*paths)
    return cls(tokenizer, base, num_codes=num_codes, num_bins=num_bins)

  @classmethod
  def train(
    cls, texts: Iterable[str], size: int, num_codes: int = 0, num_bins: int = 64
  ) -> "Vocabulary":
    """Learns byte-level BPE in which frequent words are whole tokens.

    Intermediate tokens of the merges, which no text contains, get no id; in
    other texts they are split until every part has one. A run of characters
    that `texts` lack becomes one unk, because all 256 bytes would dominate a
    small vocabulary.

    Args:
      texts: texts with their leading space, as tasks encode them.
      size: largest number of all ids; fewer if there are fewer words.

    Raises:
      UserError: `size` is too small for the characters in `texts`.
    """
    fixed = len(SPECIALS) + 1 + num_codes + num_bins + 1
    tokenizer, base, parts = training.train_bpe(
      texts, budget=size - fixed, fixed=fixed
    )
    own = {token: len(SPECIALS) + i for i, token in enumerate(base)}

    def expand(token: str) -> list[int]:
      if token in own:
        return [own[token]]
      left, right = parts[token]
      return expand(left) + expand(right)

    expansions = {token: expand(token) for token in parts if token not in own}
    return cls(
      tokenizer,
      base,
      num_codes=num_codes,
      num_bins=num_bins,
      expansions=expansions,
    )

  @classmethod
  def placeholder(
    cls, size: int, num_codes: int, num_bins: int
  ) -> "Vocabulary":
    """Returns a vocabulary of `size` ids for shapes only."""
    count = max(size - len(SPECIALS) - 2 - num_codes - num_bins, 0)
    base = [f"<unused_{i}>" for i in range(count)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    return cls(tokenizer, base, num_codes=num_codes, num_bins=num_bins)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without bos and eos.

    Raises:
      UserError: see `checked_text`.
    """
    ids = self._cache.get(text)
    if ids is None:
      table = self._ids_of_token
      ids = [
        i
        for token in self._tokenizer.encode(checked_text(text)).ids
        for i in table[token]
      ]
      if len(self._cache) >= _CACHE_SIZE:
        self._cache.clear()
      self._cache[text] = ids
    return ids.copy()

  def unknown_words(self, text: str, *, whole: bool = False) -> list[str]:
    """Returns the words of a text that are foreign to this vocabulary.

    These are words with a character that has no token or is split into bytes,
    and words of three or more letters that are spelled letter by letter.

    Args:
      whole: also return all other words of several tokens, for a vocabulary
        that was trained on whole words.
    """
    unknown = []
    split = self._tokenizer.pre_tokenizer.pre_tokenize_str(checked_text(text))
    for _, (start, end) in split:
      word = text[start:end].strip()
      ids = self.encode(text[start:end])
      # The space before a word may be a token.
      spaced = end - start > len(word) and ids[0] == self._space_id
      pieces = len(ids) - spaced
      spelled = word.isalpha() and pieces >= len(word) >= 3
      in_pieces = pieces > len(word) or (whole and pieces > 1)
      if self.unk_id in ids or spelled or in_pieces:
        unknown.append(word)
    return unknown

  @functools.cached_property
  def _space_id(self) -> int:
    """Returns the id of a single space, or unk."""
    return next(iter(self.encode(" ")), self.unk_id)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`.

    bos, pad, eos, blank, fillers and ids outside [0, size) are dropped; unk,
    mask, codes and bins become symbols such as `<bin_3>`. Bytes that are no
    UTF-8 become U+FFFD.
    """
    pieces = self._pieces
    kept = (pieces[i] for i in ids if 0 <= i < self.size)
    return _decoder().decode([piece for piece in kept if piece is not None])

  def symbol(self, index: int) -> str:
    """Returns the name of an id, such as `<s>`, `Ġred` or `<bin_3>`."""
    return self._symbols[index]

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 (hex) of everything that determines ids."""
    model = json.loads(self._tokenizer.to_str())["model"]
    content = {
      "symbols": self._symbols,
      "expansions": sorted(self._expansions.items()),
      "merges": model["merges"],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

  def save(self, folder: files.PathLike) -> None:
    """Writes `tokenizer.json` and `vocabulary.json` into `folder`."""
    path = as_path(folder)
    path.mkdir(parents=True, exist_ok=True)
    content = {
      "format": _FORMAT,
      "fingerprint": self.fingerprint,
      "num_codes": self.num_codes,
      "num_bins": self.num_bins,
      "base": self._base,
      "expansions": self._expansions,
    }
    write_text(path / _TOKENIZER_FILE, self._tokenizer.to_str(pretty=True))
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_text(path / _SYMBOLS_FILE, text)

  @classmethod
  def load(cls, folder: files.PathLike) -> "Vocabulary":
    """Reads a vocabulary that `save` wrote.

    Raises:
      UserError: a file is missing or was changed.
    """
    path = as_path(folder)
    advice = "restore it from a copy of the run"
    content = files.read_json_object(path / _SYMBOLS_FILE, advice)
    text = files.read_text(path / _TOKENIZER_FILE, advice)
    try:
      vocabulary = cls(
        tokenizers.Tokenizer.from_str(text),
        content["base"],
        num_codes=content["num_codes"],
        num_bins=content["num_bins"],
        expansions=content["expansions"],
      )
      same = vocabulary.fingerprint == content["fingerprint"]
    except Exception as e:  # The library raises plain Exception.
      what = " ".join(f"{type(e).__name__}: {e}".split())
      raise UserError(
        f"{path} has no vocabulary of this program ({what}); {advice}"
      ) from e
    if not same:
      raise UserError(
        f"the vocabulary in {path} was changed after it was saved: its"
        f" fingerprint is {vocabulary.fingerprint[:12]}, not"
        f" {str(content['fingerprint'])[:12]}; restore its files"
      )
    return vocabulary

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_cache": {}}


@functools.cache
def _decoder() -> tokenizers.decoders.ByteLevel:
  return tokenizers.decoders.ByteLevel()
