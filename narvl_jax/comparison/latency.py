"""Times encoders and decoders, all on the same batch in each round."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from narvl_jax.benchmarks import timing
from narvl_jax.comparison.ways import BASELINE
from narvl_jax.decoding import Inputs, make_steps
from narvl_jax.decoding.steps import Reader

Batch = Mapping[str, np.ndarray]
_PERCENTILE = 95
# What an encoder reads of a batch.
_ENCODED = ("image", "text", "image_mask")


class Network(NamedTuple):
  """A model with weights.

  Attributes:
    model: has a method `encode`.
    variables: prepared for its readers.
    rules: see `make_steps`.
  """

  model: nn.Module
  variables: Any
  rules: tuple[Any, ...] = ()


class TimedDecoder(NamedTuple):
  """A decoder to time.

  Attributes:
    encoder: name of its encoder.
    lengths: least and most tokens of an answer, int32 [2].
  """

  network: Network
  encoder: str
  reader: Reader
  lengths: np.ndarray


class Compiled(NamedTuple):
  """A decoder ready to run.

  Attributes:
    run: (encoded, batch, lengths) -> result of the reader.
    memory: bytes by kind, empty if XLA does not report them.
  """

  run: Callable[[Any, Batch, np.ndarray], Any]
  memory: dict[str, int]


def measure(
  encoders: Mapping[str, Network],
  programs: Mapping[str, TimedDecoder],
  batches: Sequence[Batch],
  *,
  rounds: int,
) -> dict[str, dict[str, Any]]:
  """Times all programs in turn.

  Each round runs the encoders and then all decoders on the next batch, in
  reverse order every other round, so that other load slows all of them alike.
  Everything runs once before; every measurement waits for its result.

  Args:
    programs: programs by label; `BASELINE` is one of them.
    batches: image [B, H, W, 3], text [B, T], image_mask [B] and merge_repeats
      [B]; all of one shape.
    rounds: at least 1.

  Returns:
    By label: "encoder_ms", "decoder_ms" and "whole_ms" (both together), each
    with "median", "p95" and all "rounds"; "decoder_ratio" and "whole_ratio",
    medians over the rounds of the time over that of `BASELINE`; "passes", the
    mean number of decoder passes; "tokens_per_pass", the mean length of the
    answers with eos over the passes; "memory" in bytes of the compiled decoder.
  """
  encode = {
    name: compile_encoder(encoder, batches[0])
    for name, encoder in encoders.items()
  }
  encoded = {name: run(batches[0]) for name, run in encode.items()}
  decode = {
    label: compile_decoder(program, encoded[program.encoder], batches[0])
    for label, program in programs.items()
  }
  for label, program in programs.items():
    jax.block_until_ready(
      decode[label].run(encoded[program.encoder], batches[0], program.lengths)
    )
  seconds = {name: np.zeros(rounds) for name in [*encoders, *programs]}
  passes = {label: np.ones(rounds) for label in programs}
  tokens = {label: np.ones(rounds) for label in programs}
  for i in range(rounds):
    batch = batches[i % len(batches)]
    for name, run in encode.items():
      encoded[name], seconds[name][i] = _timed(run, batch)
    for label, program in list(programs.items())[:: -1 if i % 2 else 1]:
      out, seconds[label][i] = _timed(
        decode[label].run, encoded[program.encoder], batch, program.lengths
      )
      passes[label][i] = out.get("steps", 1)
      # Lengths of the best answers, with eos.
      tokens[label][i] = 1 + np.asarray(out["lengths"])[:, 0].mean()
  results = {}
  base = programs[BASELINE]
  base_whole = seconds[base.encoder] + seconds[BASELINE]
  for label, program in programs.items():
    whole = seconds[program.encoder] + seconds[label]
    results[label] = {
      "encoder_ms": _summary(seconds[program.encoder]),
      "decoder_ms": _summary(seconds[label]),
      "whole_ms": _summary(whole),
      "decoder_ratio": float(np.median(seconds[label] / seconds[BASELINE])),
      "whole_ratio": float(np.median(whole / base_whole)),
      "passes": float(passes[label].mean()),
      "tokens_per_pass": float((tokens[label] / passes[label]).mean()),
      "memory": decode[label].memory,
    }
  return results


def length_curves(
  encoders: Mapping[str, Network],
  programs: Mapping[str, Mapping[int, TimedDecoder]],
  batch: Batch,
  *,
  rounds: int,
) -> dict[str, dict[str, list[float]]]:
  """Times decoders for answers of given lengths, in turn.

  Args:
    encoders: encoders by name.
    programs: label -> tokens of the answer -> program. Programs of equal models
      and readers are compiled once.
    batch: see `measure`.
    rounds: at least 1.

  Returns:
    By label: "lengths", "decoder_ms" and "p95_ms", one entry per length.
  """
  encoded = {
    name: compile_encoder(encoder, batch)(batch)
    for name, encoder in encoders.items()
  }
  compiled: dict[Any, Compiled] = {}
  calls: dict[Any, Callable[[], Any]] = {}
  for label, by_length in programs.items():
    for length, program in by_length.items():
      key = program.network.model, program.reader
      if key not in compiled:
        compiled[key] = compile_decoder(
          program, encoded[program.encoder], batch
        )
      calls[label, length] = lambda c=compiled[key], p=program: c.run(
        encoded[p.encoder], batch, p.lengths
      )
  timings = timing.measure(calls, rounds=rounds, calls=1)
  curves = {}
  for label, by_length in programs.items():
    found = [_summary(timings[label, n].seconds) for n in by_length]
    curves[label] = {
      "lengths": list(by_length),
      "decoder_ms": [summary["median"] for summary in found],
      "p95_ms": [summary["p95"] for summary in found],
    }
  return curves


def compile_encoder(network: Network, batch: Batch) -> Callable[[Batch], Any]:
  """Returns a function that encodes a batch and waits for the result."""
  compiled = lower_encoder(network, batch).compile()

  def run(batch: Batch) -> Any:
    arrays = (batch[name] for name in _ENCODED)
    return jax.block_until_ready(compiled(network.variables, *arrays))

  return run


def lower_encoder(network: Network, batch: Batch) -> jax.stages.Lowered:
  """Traces an encoder; variables and batch may be shapes."""
  encode = make_steps(network.model, _no_reader, network.rules).encode
  return encode.lower(network.variables, *(batch[name] for name in _ENCODED))


def compile_decoder(
  program: TimedDecoder, encoded: Any, batch: Batch
) -> Compiled:
  """Compiles a decoder for the shapes of a batch."""
  compiled = lower_decoder(program, encoded, batch).compile()
  analysis = compiled.memory_analysis()
  memory = {}
  if analysis is not None:
    memory = {
      kind: int(getattr(analysis, f"{kind}_size_in_bytes"))
      for kind in ("temp", "output", "argument")
    }
  return Compiled(
    lambda encoded, batch, lengths: compiled(
      program.network.variables, encoded, _inputs(batch, lengths)
    ),
    memory,
  )


def lower_decoder(
  program: TimedDecoder, encoded: Any, batch: Batch
) -> jax.stages.Lowered:
  """Traces a decoder; variables, encoder's output and batch may be shapes."""
  network = program.network
  steps = make_steps(network.model, program.reader, network.rules)
  return steps.decode.lower(
    network.variables, encoded, _inputs(batch, program.lengths)
  )


def _inputs(batch: Batch, lengths: Any) -> Inputs:
  return Inputs(batch["text"], batch["merge_repeats"], lengths)  # pyright: ignore[reportArgumentType]


def _no_reader(*arguments: Any) -> Any:
  raise AssertionError(f"only the encoder is run, not a reader: {arguments}")


def _timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
  start = time.perf_counter()
  out = jax.block_until_ready(call(*arguments))
  return out, time.perf_counter() - start


def _summary(seconds: np.ndarray) -> dict[str, Any]:
  milliseconds = 1e3 * seconds
  return {
    "median": float(np.median(milliseconds)),
    "p95": float(np.percentile(milliseconds, _PERCENTILE)),
    "rounds": [round(float(x), 3) for x in milliseconds],
  }
