"""CIDEr-D of captions in NumPy, fast enough for every evaluation of a run.

Vedantam et al. 2015, arXiv 1411.5726, section 5; with the details of CIDEr in
pycocoevalcap: n-grams of 1 to 4 words, clipped counts, a
Gaussian penalty of the difference in length with sigma 6, where the length is
the number of word pairs, and a factor of 10. Words are separated by
spaces and not changed; see `tokenizers`.

The weight of an n-gram falls with the number of documents (pictures) whose
references contain it. These counts come from the references of the evaluated
pictures or, so that figures of few pictures are comparable, from a file of a
larger corpus: see `DocumentFrequencies`.
"""

import collections
import dataclasses
import gzip
import io
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from narvl_jax.errors import UserError
from narvl_jax.files.disk import replacing
from narvl_jax.files.stores import as_path

_LONGEST = 4
_SIGMA = 6.0
_FORMAT = "narvl_jax document frequencies 1"


@dataclasses.dataclass(frozen=True)
class DocumentFrequencies:
  """Number of documents of a corpus in which each n-gram occurs.

  As a file: UTF-8 text, compressed if its name ends in `.gz`. The first line is
  a JSON object with `format`, `documents`, `longest` (words of an n-gram) and
  `tokenizer`; each further line has an n-gram, a tab and its count.

  Attributes:
    documents: number of documents, each with all references of one picture.
    counts: n-gram, its words separated by spaces -> documents.
    tokenizer: name of the tokenizer.
  """

  documents: int
  counts: Mapping[str, int]
  tokenizer: str = ""

  @classmethod
  def of(
    cls, documents: Iterable[Sequence[str]], tokenizer: str = ""
  ) -> "DocumentFrequencies":
    """Counts the n-grams of documents.

    Args:
      documents: references of each document, tokens separated by spaces.
      tokenizer: name of the tokenizer.
    """
    counts: collections.Counter[str] = collections.Counter()
    total = 0
    for texts in documents:
      total += 1
      counts.update({gram for text in texts for gram in _grams(text)})
    return cls(total, counts, tokenizer)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the file, n-grams in alphabetical order.

    Raises:
      OSError: it cannot be written; an existing file is kept.
    """
    header = {
      "format": _FORMAT,
      "documents": self.documents,
      "longest": _LONGEST,
      "tokenizer": self.tokenizer,
    }
    with (
      replacing(as_path(path)) as temporary,
      _open(temporary, str(path), "w") as file,
    ):
      file.write(json.dumps(header) + "\n")
      for gram, count in sorted(self.counts.items()):
        file.write(f"{gram}\t{count}\n")

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> "DocumentFrequencies":
    """Reads the file.

    Raises:
      UserError: it is missing, or not such a file.
    """
    try:
      with _open(as_path(path), str(path), "r") as file:
        header = json.loads(file.readline())
        if header["format"] != _FORMAT:
          raise ValueError("an unknown format")
        counts = {}
        for line in file:
          gram, _, count = line.rstrip("\n").rpartition("\t")
          counts[gram] = int(count)
      return cls(int(header["documents"]), counts, str(header["tokenizer"]))
    except OSError as error:
      raise UserError(f'"{path}": {error.strerror or error}') from error
    except (ValueError, KeyError, TypeError, EOFError) as error:
      raise UserError(
        f'"{path}" is not a file of document frequencies ({error}); write one'
        " by"
        " python -m narvl_jax.document_frequencies"
      ) from error


def cider_d(
  predictions: Sequence[str],
  references: Sequence[Sequence[str]],
  frequencies: DocumentFrequencies | None = None,
) -> np.ndarray:
  """Returns the CIDEr-D of each prediction, float64 [examples], from 0 to 10.

  The figure of a data set is their mean. Papers print it times 100.

  Args:
    predictions: tokens separated by spaces.
    references: references of each prediction, at least one.
    frequencies: document frequencies of another corpus; those of `references`
      if None.

  Raises:
    ValueError: not as many predictions as references, or an empty list of them.
  """
  if len(predictions) != len(references) or not all(references):
    raise ValueError("each prediction needs references")
  if not predictions:
    return np.zeros(0)
  # Texts: all predictions, then all references.
  picture = np.asarray(
    [*range(len(predictions))]
    + [i for i, texts in enumerate(references) for _ in texts]
  )
  texts = [*predictions, *(text for texts in references for text in texts)]
  documents = frequencies.documents if frequencies else len(predictions)
  similarity = np.zeros(len(texts) - len(predictions))
  words = _Words(texts)
  penalty = _penalty(words.lengths - 1, picture, len(predictions))
  for n in range(1, _LONGEST + 1):
    counts = words.count(n)
    idf = np.log(documents) - np.log(
      np.maximum(1, _document_counts(counts, words, picture, frequencies, n))
    )
    similarity += _cosine(counts, idf, picture, len(predictions)) * penalty
  numbers = np.bincount(picture) - 1
  sums = np.bincount(picture[len(predictions) :], similarity, len(predictions))
  return 10 * sums / (_LONGEST * numbers)


class _Words:
  """Texts as numbers, and their n-grams for growing n."""

  def __init__(self, texts: Sequence[str]) -> None:
    split = [text.split() for text in texts]
    self.lengths = np.asarray([len(words) for words in split])
    index: dict[str, int] = {}
    self._ids = np.asarray(
      [index.setdefault(word, len(index)) for words in split for word in words],
      np.int64,
    )
    self._words = list(index)
    self._text = np.repeat(np.arange(len(split)), self.lengths)
    ends = np.repeat(np.cumsum(self.lengths), self.lengths)
    self._left = ends - np.arange(len(self._ids))
    self._grams, self._first = self._ids, np.zeros(0, np.int64)

  def count(self, n: int) -> "_Counts":
    """Returns the counts of n-grams; call it with n = 1, 2, ... in turn."""
    size = len(self._words)
    if n > 1:
      # An n-gram is the one of n - 1 words and the word after it.
      after = np.append(self._ids[n - 1 :], np.zeros(n - 1, np.int64))
      keys = self._grams * size + after[: len(self._grams)]
      self._grams = np.unique(keys, return_inverse=True)[1].reshape(-1)
    whole = self._left >= n
    grams, self._first = np.unique(self._grams, return_index=True)
    kinds = int(grams[-1]) + 1 if len(grams) else 0
    keys, counts = np.unique(
      self._text[whole] * max(kinds, 1) + self._grams[whole], return_counts=True
    )
    text, gram = np.divmod(keys, max(kinds, 1))
    return _Counts(text, gram, counts.astype(np.float64), kinds)

  def spelled(self, gram: int, n: int) -> str:
    """Returns an n-gram of the last call of `count` as text."""
    start = self._first[gram]
    return " ".join(self._words[i] for i in self._ids[start : start + n])


@dataclasses.dataclass(frozen=True)
class _Counts:
  """Counts of n-grams in texts, sorted by text and n-gram; each [pairs].

  `kinds` is the number of different n-grams.
  """

  text: np.ndarray
  gram: np.ndarray
  count: np.ndarray
  kinds: int


def _document_counts(
  counts: _Counts,
  words: _Words,
  picture: np.ndarray,
  frequencies: DocumentFrequencies | None,
  n: int,
) -> np.ndarray:
  """Returns the number of documents with each n-gram: [kinds]."""
  if frequencies is None:
    predictions = int(picture.max()) + 1
    reference = counts.text >= predictions
    pairs = np.unique(
      picture[counts.text[reference]] * max(counts.kinds, 1)
      + counts.gram[reference]
    )
    return np.bincount(pairs % max(counts.kinds, 1), minlength=counts.kinds)
  table = np.zeros(counts.kinds)
  for gram in np.unique(counts.gram):
    table[gram] = frequencies.counts.get(words.spelled(gram, n), 0)
  return table


def _cosine(
  counts: _Counts, idf: np.ndarray, picture: np.ndarray, predictions: int
) -> np.ndarray:
  """Returns the clipped cosine of each reference and its prediction."""
  weight = counts.count * idf[counts.gram]
  norm = np.sqrt(np.bincount(counts.text, weight**2, len(picture)))
  of_prediction = counts.text < predictions
  keys = counts.text * max(counts.kinds, 1) + counts.gram
  own, own_weight = keys[of_prediction], weight[of_prediction]
  text, gram = counts.text[~of_prediction], counts.gram[~of_prediction]
  wanted = picture[text] * max(counts.kinds, 1) + gram
  reference = weight[~of_prediction]
  products = np.zeros(len(reference))
  if len(own):
    place = np.minimum(np.searchsorted(own, wanted), len(own) - 1)
    found = own[place] == wanted
    clipped = np.minimum(own_weight[place], reference) * reference
    products = np.where(found, clipped, 0)
  dots = np.bincount(text - predictions, products, len(picture) - predictions)
  norms = norm[predictions:] * norm[picture[predictions:]]
  # Without any n-grams the sums of NumPy are integers.
  return np.divide(dots, norms, out=np.zeros(len(norms)), where=norms != 0)


def _penalty(
  pairs: np.ndarray, picture: np.ndarray, predictions: int
) -> np.ndarray:
  """Returns the penalty of each reference's length: [references]."""
  pairs = np.maximum(pairs, 0)
  delta = pairs[predictions:] - pairs[picture[predictions:]]
  return np.exp(-(delta**2) / (2 * _SIGMA**2))


def _grams(text: str) -> Iterable[str]:
  words = text.split()
  for n in range(1, _LONGEST + 1):
    for i in range(len(words) - n + 1):
      yield " ".join(words[i : i + n])


def _open(path: pathlib.Path, name: str, mode: str) -> Any:
  """Opens a text file, compressed if its name ends in `.gz`."""
  if not name.endswith(".gz"):
    return path.open(mode, encoding="utf-8", newline="\n")
  # Neither name nor time: equal counts give equal files.
  file = path.open(f"{mode}b")
  packed: Any = gzip.GzipFile("", f"{mode}b", fileobj=file, mtime=0)
  packed.myfileobj = file  # Closed with it.
  return io.TextIOWrapper(packed, encoding="utf-8", newline="\n")
