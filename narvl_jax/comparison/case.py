"""Models, decodings and batches of one task of the comparison."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from narvl_jax.comparison.latency import Batch, Network, TimedDecoder
from narvl_jax.comparison.options import LENGTHS
from narvl_jax.comparison.uncached import UncachedReader
from narvl_jax.comparison.ways import AR, BASELINE, NAR, UNCACHED, Way
from narvl_jax.decoding import AutoregressiveReader, Decoding, prepare_variables
from narvl_jax.decoding.steps import Reader
from narvl_jax.errors import UserError
from narvl_jax.models import make_model


class Model(NamedTuple):
  """A model of the comparison.

  Attributes:
    encoder: name of its encoder in `Case.encoders`.
    network: model and variables, prepared for the readers.
    variables: restored variables, for the model without a cache.
  """

  encoder: str
  network: Network
  variables: Any

  @classmethod
  def of(
    cls, encoder: str, model: Any, variables: Any, rules: tuple[Any, ...] = ()
  ) -> "Model":
    """Prepares the variables for the readers."""
    prepared = prepare_variables(model, variables)
    return cls(encoder, Network(model, prepared, rules), variables)


@dataclasses.dataclass(frozen=True)
class Case:
  """A task of the comparison.

  Attributes:
    models: "AR" and "NAR".
    ways: all decodings, including inapplicable ones.
    programs: label -> program of each applicable decoding.
    batches: (batch size, number) -> batches for both models.
    facts: shapes, for the report.
  """

  task: str
  models: Mapping[str, Model]
  ways: Sequence[Way]
  programs: Mapping[str, TimedDecoder]
  batches: Callable[[int, int], list[Batch]]
  facts: Mapping[str, Any]

  @property
  def encoders(self) -> dict[str, Network]:
    """Encoders by name."""
    return {model.encoder: model.network for model in self.models.values()}


def program_of(
  model: Model, label: str, reader: Reader, lengths: np.ndarray
) -> TimedDecoder:
  """Returns the program of a decoding."""
  network = model.network
  if label == UNCACHED:
    assert isinstance(reader, AutoregressiveReader)
    reader = UncachedReader(
      reader.classes, reader.length_limit, reader.prompted
    )
    network = network._replace(variables=model.variables)
  return TimedDecoder(network, model.encoder, reader, lengths)


def choose_lengths(case: Case, lengths: Sequence[int] | None) -> list[int]:
  """Returns the lengths of answers at which decoders are timed, ascending.

  Args:
    case: its autoregressive model must have positions for them.
    lengths: those of `LENGTHS` that fit if None.

  Raises:
    UserError: an answer is longer than the position tables.
  """
  reader = case.programs[f"{AR} greedy"].reader
  assert isinstance(reader, AutoregressiveReader)
  config: Any = case.models[AR].network.model
  prompt = case.facts["text_length"] if reader.prompted else 1
  most = config.config.max_text_positions - prompt
  if lengths is None:
    return [length for length in LENGTHS if length <= most]
  if max(lengths, default=0) > most:
    raise UserError(
      f"--lengths={max(lengths)} exceeds the {most} tokens that"
      f" model.max_text_positions leaves to answers of {case.task}; nearest:"
      f" --lengths={most}"
    )
  return sorted(set(lengths))


def length_programs(
  case: Case, lengths: Sequence[int], beam_size: int
) -> dict[str, dict[int, TimedDecoder]]:
  """Returns label -> tokens of an answer -> program, for `length_curves`.

  The autoregressive model is forced to emit exactly that many tokens and eos;
  the lengths are inputs of one program. The parallel model has its own number
  of queries, and in a second curve one query per token and eos.
  """
  ar, nar = case.models[AR], case.models[NAR]
  greedy = case.programs[f"{AR} greedy"].reader
  assert isinstance(greedy, AutoregressiveReader)
  base = case.programs[BASELINE]
  readers = {
    f"{AR} greedy": Decoding(min_length=0),
    f"{AR} beam {beam_size}": Decoding(
      "beam", beam_size=beam_size, min_length=0
    ),
  }
  programs = {
    label: {
      length: program_of(
        ar,
        label,
        dataclasses.replace(
          greedy, decoding=decoding, length_limit=max(lengths)
        ),
        np.full(2, length, np.int32),
      )
      for length in lengths
    }
    for label, decoding in readers.items()
  }
  queries: Any = nar.network.model
  own = queries.config.num_queries
  programs[f"{NAR} greedy, {own} queries"] = dict.fromkeys(lengths, base)
  programs[f"{NAR} greedy, a query a token"] = {
    length: base._replace(network=with_queries(nar.network, length + 1))
    for length in lengths
  }
  return programs


def with_queries(network: Network, count: int) -> Network:
  """Returns a parallel model with `count` queries, repeated or cut."""
  model: Any = network.model
  params = network.variables["params"]
  queries = params["decoder"]["query_embed"]
  queries = np.resize(np.asarray(queries), (count, queries.shape[1]))
  decoder = {**params["decoder"], "query_embed": jax.numpy.asarray(queries)}
  return network._replace(
    model=make_model(dataclasses.replace(model.config, num_queries=count)),
    variables={**network.variables, "params": {**params, "decoder": decoder}},
  )
