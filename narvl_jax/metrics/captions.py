"""Figures of captions as the COCO evaluation computes them.

The scorers are those of pycocoevalcap, called one by one: its `COCOEvalCap`
also builds SPICE, which downloads 400 MB. CIDEr is that of `cider`, which is
equal and faster. References and predictions have the same tokenizer.

Each figure is a function of the sums of statistics per caption, so its
confidence interval is that of the corpus figure (see `bootstrap`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from narvl_jax.metrics import bootstrap, meteor, tokenizers
from narvl_jax.metrics.cider import DocumentFrequencies, cider_d

# Added by the scorer of BLEU so that nothing is divided by zero.
_TINY, _SMALL = 1e-15, 1e-9
_ORDERS = 4
_SPICE_JARS = (
  "stanford-corenlp-3.6.0.jar",
  "stanford-corenlp-3.6.0-models.jar",
)


@dataclasses.dataclass(frozen=True)
class CaptionFigure:
  """One figure of a set of captions.

  Attributes:
    name: such as "bleu_4"; "@simple" is appended for words of the plain
      tokenizer.
    value: value for the corpus; None if the figure is unavailable.
    scores: score of each caption by itself, [captions].
    statistics: [captions, k], see `bootstrap.interval`.
    figure: function from their sums to the figure.
    reason: why it is unavailable; empty otherwise.
  """

  name: str
  value: float | None = None
  scores: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
  statistics: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros((0, 2))
  )
  figure: bootstrap.Figure = bootstrap.mean
  reason: str = ""


def coco_figures(
  predictions: Sequence[str],
  references: Sequence[Sequence[str]],
  frequencies: DocumentFrequencies | None = None,
) -> list[CaptionFigure]:
  """Returns BLEU-1..4, METEOR, ROUGE-L, CIDEr and SPICE, in this order.

  Args:
    predictions: one caption of each picture; may be empty.
    references: captions of each picture, at least one.
    frequencies: document frequencies of another corpus for CIDEr; those of
      `references` if None.

  Returns:
    All figures; those that cannot be computed here have a reason and no value.

  Raises:
    ValueError: not as many predictions as references, or a picture without any.
  """
  if len(predictions) != len(references) or not all(references):
    raise ValueError("each prediction needs references")
  name, split = "", tokenizers.ptb
  if tokenizers.why_no_ptb():
    name, split = "@simple", tokenizers.simple
  texts = [*predictions, *(text for texts in references for text in texts)]
  tokens = iter(split(texts))
  predicted = [next(tokens) for _ in predictions]
  expected = [[next(tokens) for _ in texts] for texts in references]
  figures = [
    *_available(_bleu, [f"bleu_{n + 1}" for n in range(_ORDERS)])(
      predicted, expected
    ),
    *_available(_meteor, ["meteor"])(predicted, expected),
    *_available(_rouge, ["rouge_l"])(predicted, expected),
    _of_scores("cider", cider_d(predicted, expected, frequencies)),
    *_available(_spice, ["spice"])(predicted, expected),
  ]
  return [dataclasses.replace(x, name=x.name + name) for x in figures]


def simple_cider(
  predictions: Sequence[str],
  references: Sequence[Sequence[str]],
  frequencies: DocumentFrequencies | None = None,
) -> CaptionFigure:
  """Returns `cider@simple`, which needs no Java: see `coco_figures`."""
  predicted = tokenizers.simple(predictions)
  expected = [tokenizers.simple(texts) for texts in references]
  scores = cider_d(predicted, expected, frequencies)
  return _of_scores("cider@simple", scores)


def _of_scores(name: str, scores: Any) -> CaptionFigure:
  scores = np.asarray(scores, np.float64)
  value = float(scores.mean()) if len(scores) else float("nan")
  return CaptionFigure(name, value, scores, bootstrap.with_counts(scores))


def _available(scorer: Any, names: Sequence[str]) -> Any:
  """Wraps a scorer: unavailable figures instead of an exception."""

  def figures(
    predicted: Sequence[str], expected: Sequence[Sequence[str]]
  ) -> list[CaptionFigure]:
    try:
      return scorer(predicted, expected)
    except tokenizers.Unavailable as error:
      return [CaptionFigure(name, reason=str(error)) for name in names]

  return figures


def _bleu(
  predicted: Sequence[str], expected: Sequence[Sequence[str]]
) -> list[CaptionFigure]:
  tokenizers.package_folder()
  from pycocoevalcap.bleu.bleu_scorer import BleuScorer

  scorer = BleuScorer(n=_ORDERS)
  for prediction, texts in zip(predicted, expected, strict=True):
    scorer += (prediction, list(texts))
  corpus, scores = scorer.compute_score(option="closest", verbose=0)
  statistics = np.asarray(
    [
      [
        *(*x["correct"], *x["guess"], x["testlen"]),
        min((abs(n - x["testlen"]), n) for n in x["reflen"])[1],
      ]
      for x in scorer.ctest
    ],
    np.float64,
  )
  return [
    CaptionFigure(
      f"bleu_{n + 1}",
      float(corpus[n]),
      np.asarray(scores[n]),
      statistics,
      lambda sums, n=n: bleu_of_sums(sums)[..., n],
    )
    for n in range(_ORDERS)
  ]


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
  """Returns BLEU-1..4, [..., 4], of sums over captions.

  Papineni et al. 2002, with the constants of pycocoevalcap.

  Args:
    sums: [..., 10]: matches of 1 to 4 words, n-grams of 1 to 4 words, words of
      the predictions, words of the references closest in length.
  """
  matches, grams = sums[..., :_ORDERS], sums[..., _ORDERS : 2 * _ORDERS]
  precisions = (matches + _TINY) / (grams + _SMALL)
  orders = np.arange(1, _ORDERS + 1)
  means = np.cumprod(precisions, -1) ** (1 / orders)
  ratio = (sums[..., -2:-1] + _TINY) / (sums[..., -1:] + _SMALL)
  return means * np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1)


def _rouge(
  predicted: Sequence[str], expected: Sequence[Sequence[str]]
) -> list[CaptionFigure]:
  tokenizers.package_folder()
  from pycocoevalcap.rouge.rouge import Rouge

  rouge = Rouge()
  scores = [
    rouge.calc_score([prediction], list(texts))
    for prediction, texts in zip(predicted, expected, strict=True)
  ]
  return [_of_scores("rouge_l", scores)]


def _meteor(
  predicted: Sequence[str], expected: Sequence[Sequence[str]]
) -> list[CaptionFigure]:
  statistics = meteor.statistics(predicted, expected)
  value = float(meteor.score(statistics.sum(0)))
  scores = meteor.score(statistics)
  return [CaptionFigure("meteor", value, scores, statistics, meteor.score)]


def _spice(
  predicted: Sequence[str], expected: Sequence[Sequence[str]]
) -> list[CaptionFigure]:
  folder = tokenizers.package_folder() / "spice" / "lib"
  tokenizers.java()
  missing = [x for x in _SPICE_JARS if not (folder / x).is_file()]
  if missing:
    raise tokenizers.Unavailable(
      f"put {' and '.join(missing)} of Stanford CoreNLP 3.6.0 into {folder}"
    )
  from pycocoevalcap.spice.spice import Spice

  with meteor.utf8_java():
    try:
      _, found = Spice().compute_score(
        {i: list(texts) for i, texts in enumerate(expected)},
        {i: [text] for i, text in enumerate(predicted)},
      )
    except Exception as error:
      raise tokenizers.Unavailable(f"SPICE failed: {error}") from error
  scores = np.asarray([x["All"]["f"] for x in found], np.float64)
  # Pictures whose references have no objects have no score.
  scores = np.nan_to_num(scores)
  return [_of_scores("spice", scores)]
