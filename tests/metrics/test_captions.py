"""Caption figures against pycocoevalcap, and where parts of it are missing."""

import importlib.util
import os
import random
import re
from typing import Any

import numpy as np
import pytest

from narvl_jax.metrics import bootstrap, captions, cider, meteor, tokenizers

_WORDS = re.findall(
  r"\S+",
  """
  a the man dog cat's running jumps “quoted” it's isn't U.S. (red) blue; green,
  on-top - -- ... 日本 naïve café's 3.5 1,000 #1 ||| 😀 and/or @you &amp; 'n'
  [x] {y} don't 5'9"
  """,
)
_NO_PTB = tokenizers.why_no_ptb()
needs_ptb = pytest.mark.skipif(bool(_NO_PTB), reason=_NO_PTB or "available")


def _caption(rng: random.Random, empty: float) -> str:
  if rng.random() < empty:
    return rng.choice(["", " ", "."])
  words = rng.choices(_WORDS, k=rng.randint(1, 12))
  return " ".join(words) + rng.choice([".", "!", "", ",", " ", "\n"])


@pytest.fixture(scope="module")
def pictures():
  rng = random.Random(1)
  references = [
    [_caption(rng, 0.01) for _ in range(rng.randint(1, 5))] for _ in range(300)
  ]
  predictions = [
    rng.choice(texts) if rng.random() < 0.3 else _caption(rng, 0.05)
    for texts in references
  ]
  return predictions, references


@pytest.fixture(scope="module", autouse=True)
def one_meteor():
  """All METEOR of this file uses one Java process, which starts slowly.

  Returns the options for Java at each request for one.
  """
  if _NO_PTB:
    yield []
    return
  from pycocoevalcap.meteor import meteor as package

  started: list[Any] = []
  options = []
  meteor_class = package.Meteor

  def shared():
    options.append(os.environ.get("JAVA_TOOL_OPTIONS", ""))
    if not started:
      with meteor.utf8_java():
        started.append(meteor_class())
    return started[0]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(package, "Meteor", shared)
    yield options
  for process in (each.meteor_p for each in started):
    process.stdin.close()
    process.wait()
    process.stdout.close()
    process.stderr.close()


@pytest.fixture(scope="module")
def official(pictures, one_meteor):
  from pycocoevalcap.bleu.bleu import Bleu
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.meteor.meteor import Meteor
  from pycocoevalcap.rouge.rouge import Rouge
  from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

  predictions, references = pictures
  split = PTBTokenizer().tokenize
  predicted = split({i: [{"caption": x}] for i, x in enumerate(predictions)})
  expected = split(
    {i: [{"caption": x} for x in texts] for i, texts in enumerate(references)}
  )
  tokens = {i: [x.replace("|||", "") for x in predicted[i]] for i in predicted}
  clean = {i: [x.replace("|||", "") for x in expected[i]] for i in expected}
  figures = {
    "meteor": Meteor().compute_score(clean, tokens),
    "rouge_l": Rouge().compute_score(expected, predicted),
    "cider": Cider().compute_score(expected, predicted),
  }
  values, scores = Bleu(4).compute_score(expected, predicted, verbose=0)
  for n in range(4):
    figures[f"bleu_{n + 1}"] = values[n], scores[n]
  return figures


@needs_ptb
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_equal_to_pycocoevalcap(pictures, official):
  found = {x.name: x for x in captions.coco_figures(*pictures)}
  for name, (value, scores) in official.items():
    assert found[name].value == pytest.approx(value, abs=1e-9), name
    np.testing.assert_allclose(found[name].scores, scores, atol=1e-9)
    # The figure of the sums is the figure of the corpus.
    sums = found[name].statistics.sum(0)
    assert float(found[name].figure(sums)) == pytest.approx(value, abs=1e-9)
    interval = bootstrap.interval(
      found[name].statistics, range(300), found[name].figure, draws=50
    )
    assert interval.low < interval.value < interval.high
    assert interval.value == pytest.approx(value, abs=1e-9)
  spice = found["spice"]
  if spice.value is None:
    assert "stanford-corenlp-3.6.0.jar" in spice.reason


@needs_ptb
def test_captions_keep_their_pictures():
  """Line separators within captions do not shift later ones."""
  texts = ["a\u2028b", "c\x85d", "", "e\r\nf\x0b", "\ud83d lone", "", "g", ""]
  assert tokenizers.ptb(texts)[:4] == ["a b", "c d", "", "e f"]
  assert tokenizers.ptb(texts)[6] == "g"
  assert len(tokenizers.ptb(texts)) == len(texts)
  assert tokenizers.ptb([]) == []


@needs_ptb
def test_meteor_survives_any_caption(one_meteor):
  found = meteor.statistics(
    ["", "|||", "a ||| b", "dog", ""],
    [["dog"], ["|||"], ["a b"], [""], [""]],
  )
  assert "-Dfile.encoding=UTF-8" in one_meteor[-1]
  scores = meteor.score(found)
  assert scores.shape == (5,)
  assert scores[2] == pytest.approx(1)
  np.testing.assert_array_equal(scores[[0, 3, 4]], 0)


@pytest.mark.skipif(
  importlib.util.find_spec("pycocoevalcap") is None,
  reason="pycocoevalcap is not installed",
)
def test_without_java(monkeypatch):
  monkeypatch.setenv("PATH", "")
  monkeypatch.delenv("JAVA_HOME", raising=False)
  tokenizers.why_no_ptb.cache_clear()
  try:
    found = {
      x.name: x
      for x in captions.coco_figures(["A dog."], [["a dog", "The dog!"]])
    }
  finally:
    monkeypatch.undo()
    tokenizers.why_no_ptb.cache_clear()
  assert found["bleu_1@simple"].value == pytest.approx(1)
  assert found["rouge_l@simple"].value == pytest.approx(1)
  assert found["cider@simple"].value is not None
  for name in ("meteor@simple", "spice@simple"):
    assert found[name].value is None
    assert "there is no Java" in found[name].reason


def test_without_the_package(monkeypatch):
  monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
  tokenizers.why_no_ptb.cache_clear()
  try:
    found = {x.name: x for x in captions.coco_figures(["a dog"], [["a dog"]])}
  finally:
    monkeypatch.undo()
    tokenizers.why_no_ptb.cache_clear()
  assert found["cider@simple"].value == 0
  assert "narvl_jax[metrics]" in found["bleu_4@simple"].reason


def test_simple_tokens():
  assert tokenizers.simple(["A man's DOG, isn't it? x_y 3.5", ""]) == [
    "a man's dog isn't it x y 3 5",
    "",
  ]


def test_each_prediction_needs_references():
  for references in ([], [["a"], []]):
    with pytest.raises(ValueError, match="needs references"):
      captions.coco_figures(["a", "b"], references)
    with pytest.raises(ValueError, match="needs references"):
      cider.cider_d(["a", "b"], references)
