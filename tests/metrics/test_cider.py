"""CIDEr-D in NumPy against a slow plain version; document frequencies."""

import collections
import math
import random

import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.metrics import cider


def _slow(predictions, references, documents, counts):
  """Equation by equation, with dictionaries."""

  def vectors(text):
    words = text.split()
    found = [collections.Counter() for _ in range(4)]
    for n in range(4):
      for i in range(len(words) - n):
        found[n][tuple(words[i : i + n + 1])] += 1
    weights = [
      {
        gram: count * (math.log(documents) - math.log(max(1, counts(gram))))
        for gram, count in grams.items()
      }
      for grams in found
    ]
    return weights, max(len(words) - 1, 0)

  scores = []
  for prediction, texts in zip(predictions, references, strict=True):
    total = 0.0
    own, length = vectors(prediction)
    for text in texts:
      other, other_length = vectors(text)
      penalty = math.exp(-((length - other_length) ** 2) / 72)
      for a, b in zip(own, other, strict=True):
        norms = math.hypot(*a.values()) * math.hypot(*b.values())
        if norms:
          dot = sum(min(a[g], b[g]) * b[g] for g in a.keys() & b.keys())
          total += dot / norms * penalty
    scores.append(10 * total / 4 / len(texts))
  return scores


def _pictures(rng, count):
  def caption():
    if rng.random() < 0.05:
      return rng.choice(["", "w1"])
    words = [f"w{int(rng.paretovariate(0.6)) % 50}" for _ in range(12)]
    return " ".join(words[: rng.randint(1, 12)])

  references = [
    [caption() for _ in range(rng.randint(1, 5))] for _ in range(count)
  ]
  predictions = [
    rng.choice(texts) if rng.random() < 0.4 else caption()
    for texts in references
  ]
  return predictions, references


@pytest.mark.parametrize("count", [1, 2, 3, 60])
def test_equal_to_the_plain_version(count):
  predictions, references = _pictures(random.Random(count), count)
  documents = cider.DocumentFrequencies.of(references)
  expected = _slow(
    predictions,
    references,
    count,
    lambda gram: documents.counts.get(" ".join(gram), 0),
  )
  for given in (None, documents):
    found = cider.cider_d(predictions, references, given)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_frequencies_of_another_corpus():
  predictions, references = _pictures(random.Random(0), 20)
  _, corpus = _pictures(random.Random(1), 100)
  documents = cider.DocumentFrequencies.of(corpus)
  expected = _slow(
    predictions,
    references,
    100,
    lambda gram: documents.counts.get(" ".join(gram), 0),
  )
  found = cider.cider_d(predictions, references, documents)
  np.testing.assert_allclose(found, expected, atol=1e-9)
  # A single picture has a figure then.
  one = cider.cider_d(predictions[:1], references[:1], documents)
  np.testing.assert_allclose(one, expected[:1], atol=1e-9)


def test_no_captions():
  assert cider.cider_d([], []).shape == (0,)


@pytest.mark.parametrize("name", ["df.tsv", "df.tsv.gz"])
def test_the_file(tmp_path, name):
  _, references = _pictures(random.Random(2), 10)
  documents = cider.DocumentFrequencies.of(references, "ptb")
  documents.save(tmp_path / name)
  first = (tmp_path / name).read_bytes()
  assert cider.DocumentFrequencies.load(tmp_path / name) == documents
  documents.save(tmp_path / name)
  assert (tmp_path / name).read_bytes() == first


@pytest.mark.parametrize(
  "content",
  [b"", b"{}", b"[]", b'{"format": "x"}\n', b"\xff\xfe", b"\x80\x04K\x01."],
)
def test_other_files_are_rejected(tmp_path, content):
  path = tmp_path / "df.tsv"
  path.write_bytes(content)
  with pytest.raises(UserError, match="not a file of document frequencies"):
    cider.DocumentFrequencies.load(path)
  path = tmp_path / "df.gz"
  path.write_bytes(content)
  with pytest.raises(UserError, match=r"df\.gz"):
    cider.DocumentFrequencies.load(path)


def test_a_missing_file(tmp_path):
  with pytest.raises(UserError, match="No such file"):
    cider.DocumentFrequencies.load(tmp_path / "df.tsv")
