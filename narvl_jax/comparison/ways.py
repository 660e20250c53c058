"""The compared decodings of both models."""

import dataclasses
from collections.abc import Sequence

from narvl_jax.data.tasks import AnswerSpace
from narvl_jax.decoding import Decoding
from narvl_jax.errors import UserError, did_you_mean

AR, NAR = "AR", "NAR"
# Autoregressive, with one decoder layer and the other layers in the encoder.
DEEP = "AR deep"
# Ratios are relative to this decoding.
BASELINE = f"{NAR} greedy"
UNCACHED = f"{AR} uncached"


@dataclasses.dataclass(frozen=True)
class Way:
  """A model and a decoding.

  Attributes:
    model: "AR" or "NAR".
    decoding: None if the task does not allow it.
    reason: why it is None.
  """

  model: str
  name: str
  decoding: Decoding | None
  reason: str = ""

  @property
  def label(self) -> str:
    """Name in tables."""
    return f"{self.model} {self.name}"


def ways_of(
  space: AnswerSpace | None,
  reason: str,
  reference: Decoding,
  *,
  beam_size: int,
  uncached: bool = False,
  deep: bool = False,
) -> list[Way]:
  """Returns the decodings of a task.

  Searches are constrained if the task has a set of answers. The autoregressive
  beam search has the official settings of the task. Where the official code
  scores all answers instead, the log-probability is not divided by the length,
  as in its other mode.

  Args:
    space: the answers that the task allows; any if None.
    reason: why there is no `space`.
    reference: official decoding of the autoregressive model.
    beam_size: hypotheses of both models.
    uncached: whether to add greedy search without a cache.
    deep: whether to add the model `DEEP`.
  """
  constrained = space is not None
  closed = space is not None and bool(space.sequences)
  if closed or not constrained:
    no_list = reason
  else:
    no_list = "there is no list of the answers"
  beam = Decoding("beam", constrained=constrained, normalize=False)
  if reference.method == "beam":
    beam = reference
  beam = dataclasses.replace(beam, beam_size=beam_size)
  candidates = Decoding("candidates", constrained=True) if closed else None
  fenced = Decoding(constrained=True) if constrained else None
  parallel_beam = Decoding("beam", constrained=constrained, beam_size=beam_size)
  ways = [
    Way(AR, "greedy", Decoding()),
    Way(AR, f"beam {beam_size}", beam),
    Way(AR, "candidates", candidates, "" if closed else no_list),
    Way(NAR, "greedy", Decoding()),
    Way(NAR, "constrained", fenced, "" if constrained else reason),
    Way(NAR, f"beam {beam_size}", parallel_beam),
    Way(NAR, "candidates", candidates, "" if closed else no_list),
  ]
  if deep:
    ways[3:3] = [
      Way(DEEP, "greedy", Decoding()),
      Way(DEEP, f"beam {beam_size}", beam),
    ]
  if uncached:
    ways.insert(1, Way(AR, "uncached", Decoding()))
  return ways


def choose(ways: Sequence[Way], wanted: Sequence[str]) -> list[Way]:
  """Returns the wanted decodings, such as "AR beam" or "ar-beam-5".

  Greedy decoding of both models is always included.

  Raises:
    UserError: there is no such decoding.
  """
  if not wanted:
    return list(ways)
  names = {_plain(way.label): way for way in ways}
  chosen = {BASELINE, f"{AR} greedy"}
  for label in wanted:
    plain = _plain(label)
    found = [n for n in names if n == plain or n.startswith(plain + "-")]
    if not found:
      raise UserError(
        f'--ways: there is no decoding "{label}".{did_you_mean(plain, names)}'
      )
    chosen |= {names[n].label for n in found}
  return [way for way in ways if way.label in chosen]


def _plain(label: str) -> str:
  return "-".join(label.lower().replace("-", " ").replace("/", " ").split())
