"""Settings of decoding."""

import dataclasses
import numbers

from narvl_jax.errors import UserError, did_you_mean

METHODS = ("greedy", "beam", "candidates")


@dataclasses.dataclass(frozen=True)
class Decoding:
  """A way to decode; hashable, so that compiled programs can be cached by it.

  The last four attributes are for autoregressive models only.

  Attributes:
    method: "greedy" takes the best token at each place, "beam" searches,
      "candidates" scores every answer of a closed set.
    constrained: restrict answers to those that the task allows: its list of
      answers, or four coordinates for a box. "candidates" always does.
    beam_size: hypotheses that a beam search keeps.
    num_best: answers to return, best first.
    min_length: least tokens before eos.
    max_length: most tokens without eos; 0 for as many as
      `data.max_label_length` leaves room for.
    no_repeat_ngram: no sequence of so many tokens occurs twice; 0 allows all.
    normalize: rank hypotheses by log-probability divided by the number of
      tokens, eos included.
  """

  method: str = "greedy"
  constrained: bool = False
  beam_size: int = 5
  num_best: int = 1
  min_length: int = 1
  max_length: int = 0
  no_repeat_ngram: int = 0
  normalize: bool = True

  def __post_init__(self) -> None:
    if self.method not in METHODS:
      raise UserError(
        f'the decoding method "{self.method}" is unknown.'
        f"{did_you_mean(self.method, METHODS)} (--decoding)"
      )
    for name, least in (
      ("beam_size", 1),
      ("num_best", 1),
      ("min_length", 0),
      ("max_length", 0),
      ("no_repeat_ngram", 0),
    ):
      value = getattr(self, name)
      if not isinstance(value, numbers.Integral):
        raise UserError(
          f"decoding.{name}={value!r} must be a whole number, such as"
          f" {max(least, 1)} (--{name})"
        )
      if value < least:
        raise UserError(
          f"decoding.{name}={value} must be at least {least}; nearest:"
          f" {least} (--{name})"
        )
    for name in ("constrained", "normalize"):
      value = getattr(self, name)
      if not isinstance(value, bool):
        raise UserError(
          f"decoding.{name}={value!r} must be True or False (--{name})"
        )
    if self.max_length and self.min_length > self.max_length:
      raise UserError(
        f"decoding.min_length={self.min_length} exceeds decoding.max_length="
        f"{self.max_length}; nearest: {self.max_length} (--min_length)"
      )
    if self.num_best > self.beam_size and self.method == "beam":
      raise UserError(
        f"decoding.num_best={self.num_best} exceeds decoding.beam_size="
        f"{self.beam_size}; nearest: {self.beam_size} (--num_best)"
      )
