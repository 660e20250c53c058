"""Estimates of the compiler for one chip of an absent TPU."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from narvl_jax.ahead_of_time.program import Program, read_program
from narvl_jax.ahead_of_time.topology import Chip, Topology
from narvl_jax.comparison.case import Case
from narvl_jax.comparison.latency import (
  Network,
  TimedDecoder,
  lower_decoder,
  lower_encoder,
)
from narvl_jax.comparison.ways import BASELINE, NAR


def estimate(
  case: Case, batch_size: int, topology: Topology
) -> dict[str, dict[str, float]]:
  """Compiles the programs of a case for one chip, and estimates their times.

  Args:
    case: the task; its variables are shapes.
    batch_size: examples at a time.
    topology: result of `get_topology`.

  Returns:
    By label: "encoder_ms", "decoder_ms", "passes", "tokens_per_pass",
    "decoder_ratio" and "whole_ratio" to `BASELINE`, and "decoder_bytes" of
    HBM. Every decoding is estimated for the longest answer of the task, so
    a search has as many passes as this answer needs.
  """
  chip = topology.chip
  mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
  place = NamedSharding(mesh, PartitionSpec())

  def placed(tree: Any) -> Any:
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )

  batch = placed(case.batches(batch_size, 1)[0])
  encoded, seconds = {}, {}
  for name, network in case.encoders.items():
    network = _placed(network, placed)
    lowered = lower_encoder(network, batch)
    encoded[name] = placed(lowered.out_info)
    seconds[name] = _seconds(_read(lowered, 1), chip)
  found: dict[str, dict[str, float]] = {}
  for label, program in case.programs.items():
    passes = _passes(program, label)
    abstract = program._replace(
      network=_placed(program.network, placed), lengths=placed(program.lengths)
    )
    lowered = lower_decoder(abstract, encoded[program.encoder], batch)
    read = _read(lowered, passes)
    found[label] = {
      "encoder_ms": 1e3 * seconds[program.encoder],
      "decoder_ms": 1e3 * _seconds(read, chip),
      "decoder_bytes": read.hbm_bytes,
      "passes": passes,
      "tokens_per_pass": (int(program.lengths[1]) + 1) / passes,
    }
  base = found[BASELINE]
  for way in found.values():
    way["decoder_ratio"] = way["decoder_ms"] / base["decoder_ms"]
    way["whole_ratio"] = _whole(way) / _whole(base)
  return found


def _placed(network: Network, placed: Any) -> Network:
  return network._replace(variables=placed(network.variables))


def _read(lowered: Any, passes: int) -> Program:
  return read_program(lowered.compile().as_text(), unknown_trips=passes)


def _seconds(program: Program, chip: Chip) -> float:
  return sum(line.seconds(chip) for line in program.lines)


def _passes(program: TimedDecoder, label: str) -> int:
  """Returns the passes of a decoder; the last one of a search emits eos."""
  searches = not label.startswith(NAR) and "candidates" not in label
  return int(program.lengths[1]) + 1 if searches else 1


def _whole(way: Mapping[str, float]) -> float:
  return way["encoder_ms"] + way["decoder_ms"]
