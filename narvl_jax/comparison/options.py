"""Options of a comparison."""

import dataclasses
import os
from collections.abc import Sequence

from narvl_jax.errors import UserError, check_counts, check_lists
from narvl_jax.files.paths import check_folder

# Default numbers of tokens of an answer, as far as a model has positions.
LENGTHS = (1, 2, 4, 8, 16, 20)


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of a comparison.

  They are the flags of `narvl_jax.compare`, whose help explains them.

  Raises:
    UserError: a value is out of range, or two contradict each other.
  """

  nar: str = ""
  ar: str = ""
  size: str = ""
  tasks: Sequence[str] = ()
  split: str = "test"
  max_examples: int | None = None
  checkpoint: str | int = "best"
  topology: str = ""
  image_size: int | None = None
  batch_sizes: Sequence[int] = (1, 8)
  rounds: int = 10
  lengths: Sequence[int] | None = None
  beam_size: int = 5
  ways: Sequence[str] = ()
  answers: str = ""
  uncached: bool = False
  measure_quality: bool = True
  measure_latency: bool = True
  to: str | None = None

  def __post_init__(self) -> None:
    self._check_models()
    check_lists(
      tasks=self.tasks,
      ways=self.ways,
      lengths=self.lengths,
      batch_sizes=self.batch_sizes,
    )
    self._check_files()
    check_counts(least=0, max_examples=self.max_examples)
    check_counts(rounds=self.rounds, beam_size=self.beam_size)
    check_counts(batch_size=min(self.batch_sizes, default=None))
    check_counts(lengths=min(self.lengths or (), default=None))

  @property
  def scores_answers(self) -> bool:
    """Whether quality is measured: random weights have none."""
    return self.measure_quality and not self.size

  @property
  def draws(self) -> bool:
    """Whether the plot of the lengths is drawn."""
    no_lengths = self.lengths is not None and not self.lengths
    timed = self.measure_latency and not self.topology
    return self.to is not None and timed and not no_lengths

  def _check_models(self) -> None:
    if self.size and (self.nar or self.ar):
      raise UserError(
        f"--size={self.size} has random weights and needs no runs; drop --size,"
        " or --nar and --ar"
      )
    if not self.size:
      for flag in ("nar", "ar"):
        if not getattr(self, flag):
          raise UserError(f"--{flag}=RUN is missing (or use --size=base)")
      if self.image_size is not None:
        raise UserError(
          f"--image_size={self.image_size} is for --size; runs have their own"
        )
    if self.topology and not self.size:
      raise UserError(
        f"--topology={self.topology} is for random weights; add --size=base"
      )
    if not (self.measure_latency or self.scores_answers):
      raise UserError(
        "nothing is left to measure; drop --no_latency"
        + ("" if self.size else " or --no_quality")
      )

  def _check_files(self) -> None:
    if self.size and self.answers:
      raise UserError(
        f"--answers={self.answers} is for --nar and --ar; --size={self.size}"
        " has answers of its own"
      )
    if self.to is not None and os.path.isfile(self.to):
      raise UserError(
        f"--to={self.to} is a file; give a folder for the results"
      )
    if self.to is not None:
      check_folder("--to", self.to)
