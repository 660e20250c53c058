"""A trace as a page: queries are the columns."""

from collections.abc import Callable

import numpy as np

from narvl_jax.inspection import markup
from narvl_jax.inspection.markup import Markup, element
from narvl_jax.inspection.picture import answer_text, heat_map, thumbnail
from narvl_jax.inspection.trace import Query, Trace

_SIDE = 128


def trace_page(trace: Trace, title: str, command: str) -> str:
  """Returns the page.

  Args:
    trace: trace of a request.
    title: headline, such as the run and its step.
    command: command line that makes the page.
  """
  image = trace.record.image
  assert isinstance(image, np.ndarray)
  picture = thumbnail(image, 2 * _SIDE)
  rows = [
    ("task", trace.record.task),
    ("prompt", trace.record.prompt or "(none)"),
    ("answer", f"{answer_text(trace)} ({100 * trace.probability:.1f} %)"),
    ("tokens of the answer", " | ".join(trace.words) or "(none)"),
  ]
  if trace.target_probability is not None:
    share = f"{100 * trace.target_probability:.1f} %"
    rows.append(("target", f"{' | '.join(trace.labels)} ({share})"))
  return markup.page(
    title,
    element("p", command, class_="faint"),
    markup.picture(picture, "the picture of the request", class_="pixels"),
    markup.table(rows),
    markup.section("Queries", _explanation(), _queries(trace)),
    markup.section("Alignment of the target", *_posterior(trace)),
  )


def _explanation() -> Markup:
  return element(
    "p",
    "Each column is a query of the decoder. The first row is the token of the"
    " answer that it emits: neighbouring queries of one cell are merged, blanks"
    " are dropped. The pictures show the cross-attention of the last decoder"
    " layer, averaged over heads; the strongest colour is the largest share of"
    " this query. The rest of the attention is on the text.",
    class_="faint",
  )


def _queries(trace: Trace) -> Markup:
  queries = trace.queries
  image = trace.record.image
  assert isinstance(image, np.ndarray)

  def looks(query: Query) -> object:
    if query.word is None:
      return element("div", "blank", class_="faint")
    drawn = heat_map(image, query.attention, _SIDE)
    alt = f"attention to the picture: {100 * query.looks:.0f} %"
    return markup.join(
      [
        markup.picture(drawn, alt),
        element("div", f"picture {100 * query.looks:.0f} %", class_="faint"),
      ]
    )

  rows = [
    element("tr", *(element("th", x) for x in ("", *range(len(queries))))),
    element("tr", element("th", "answer"), *_words(trace)),
    _row("looks at", trace, looks),
  ]
  for rank in range(len(queries[0].tokens)):

    def token(query: Query, rank: int = rank) -> Markup:
      text, probability = query.tokens[rank]
      share = element("div", f"{100 * probability:.1f} %", class_="faint")
      return markup.join([text, share])

    rows.append(_row(f"token {rank + 1}", trace, token))
  grid = element("table", *rows, class_="cells")
  return element("div", grid, class_="scroll")


def _row(name: str, trace: Trace, content: Callable[[Query], object]) -> Markup:
  cells = [
    element("td", content(x), class_="blank" if x.blank else "spoken")
    for x in trace.queries
  ]
  return element("tr", element("th", name), *cells)


def _words(trace: Trace) -> list[Markup]:
  """Returns a cell for each token of the answer, over all its queries."""
  cells = []
  start = 0
  while start < len(trace.queries):
    end, word = start + 1, trace.queries[start].word
    while end < len(trace.queries) and trace.queries[end].word == word:
      end += 1
    kind = "blank" if word is None else "word"
    text = "-" if word is None else trace.words[word]
    cells.append(element("td", text, colspan=end - start, class_=kind))
    start = end
  return cells


def _posterior(trace: Trace) -> list[Markup]:
  if trace.posterior is None:
    return [markup.missing(trace.note)]
  explanation = element(
    "p",
    "Probability that a query emits a label, given that the answer is the"
    " target: the posterior of the CTC alignment, as in the training loss.",
    class_="faint",
  )
  blank = np.clip(1 - trace.posterior.sum(1), 0, 1)
  rows = [
    element("tr", *(element("th", x) for x in ("", *range(len(trace.queries)))))
  ]
  for label, values in zip(
    (*trace.labels, "blank"), (*trace.posterior.T, blank), strict=True
  ):
    kind = "blank" if label == "blank" else "spoken"
    cells = [
      element(
        "td",
        f"{100 * value:.0f}" if value >= 0.005 else "",
        style=f"background: rgba(var(--mark), {0.7 * value:.2f})",
      )
      for value in values.tolist()
    ]
    rows.append(element("tr", element("th", label), *cells, class_=kind))
  grid = element("table", *rows, class_="cells")
  return [explanation, element("div", grid, class_="scroll")]
