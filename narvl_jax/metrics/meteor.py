"""METEOR 1.5 (Denkowski and Lavie 2014) by the Java program of pycocoevalcap.

The program aligns a caption with its references and returns 23 counts. The
score of a caption is a function of these counts, and that of a corpus is the
same function of their sums. So NumPy computes both here, and confidence
intervals need no further process.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from narvl_jax.metrics import tokenizers

# Parameters for English: weights of matches by form, stem, synonym and
# paraphrase; of precision against recall; exponent and factor of the penalty
# for a different order of words; weight of content against function words.
_MATCHES = np.asarray([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
COUNTS = 23
_CHUNKS = 20


def statistics(
  predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> np.ndarray:
  """Returns the counts of each caption, float64 [captions, 23].

  The program chooses the best matching reference.

  Args:
    predictions: tokens separated by spaces; may be empty.
    references: references of each prediction.

  Raises:
    Unavailable: Java or pycocoevalcap is missing, or the program fails.
  """
  tokenizers.package_folder()
  tokenizers.java()
  from pycocoevalcap.meteor.meteor import Meteor

  rows = []
  try:
    with utf8_java():
      meteor = Meteor()
    for prediction, texts in zip(predictions, references, strict=True):
      prediction, *texts = (x.replace("|||", "") for x in (prediction, *texts))
      row = [float(x) for x in meteor._stat(prediction, texts).split()]
      if len(row) != COUNTS:
        raise tokenizers.Unavailable(
          f'METEOR gave {len(row)} counts for "{prediction}"'
        )
      rows.append(row)
  except (OSError, ValueError) as error:
    raise tokenizers.Unavailable(f"METEOR failed: {error}") from error
  counts = np.asarray(rows, np.float64).reshape(-1, COUNTS)
  # A caption that equals a reference has no penalty for its one chunk.
  counts[_perfect(counts), _CHUNKS] = 0
  return counts


def score(counts: np.ndarray) -> np.ndarray:
  """Returns METEOR, [...] in [0, 1], of counts or sums of counts [..., 23].

  The counts: words of test and reference; function words of both; for each of
  the four kinds of match, content words of test and reference and function
  words of test and reference that matched; chunks; matched words of both.
  """
  test, reference, test_function, reference_function = np.moveaxis(
    counts[..., :4], -1, 0
  )
  matches = counts[..., 4:_CHUNKS].reshape(*counts.shape[:-1], 4, 4)
  kinds = np.moveaxis(matches, -1, 0) @ _MATCHES
  with np.errstate(divide="ignore", invalid="ignore"):
    precision = _weighted(kinds[0], kinds[2]) / _weighted(
      test - test_function, test_function
    )
    recall = _weighted(kinds[1], kinds[3]) / _weighted(
      reference - reference_function, reference_function
    )
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    chunks, *matched = np.moveaxis(counts[..., _CHUNKS:], -1, 0)
    fragmentation = chunks / (sum(matched) / 2)
    result = mean * (1 - _GAMMA * fragmentation**_BETA)
  return np.nan_to_num(result)


def _weighted(content: np.ndarray, function: np.ndarray) -> np.ndarray:
  return _DELTA * content + (1 - _DELTA) * function


def _perfect(counts: np.ndarray) -> np.ndarray:
  one = counts[:, _CHUNKS] == 1
  return one & np.all(counts[:, :2] == counts[:, _CHUNKS + 1 :], -1)


@contextlib.contextmanager
def utf8_java() -> Iterator[None]:
  """Lets programs start the `java` of this module, with UTF-8 in any locale.

  Raises:
    Unavailable: there is no Java.
  """
  folder, options = "PATH", "JAVA_TOOL_OPTIONS"
  before = {name: os.environ.get(name) for name in (folder, options)}
  paths = os.path.dirname(tokenizers.java()), before[folder]
  os.environ[folder] = os.pathsep.join(filter(None, paths))
  os.environ[options] = f"{before[options] or ''} -Dfile.encoding=UTF-8".strip()
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value
