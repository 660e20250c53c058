"""A small OFA against recorded outputs of the official code.

The recorded files hold outputs only; the weights come from names and shapes.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.decoding.beam_search import beam_search
from narvl_jax.decoding.constraint import Automaton, answer_trie
from narvl_jax.interop import official_from_variables, variables_from_official
from narvl_jax.models import (
  Autoregressive,
  EncoderDecoder,
  model_config,
  project,
)
from narvl_jax.models.autoregressive import (
  BOS_ID,
  Prompt,
  make_prompt,
  teacher_forcing,
)
from narvl_jax.models.cached_decoder import (
  extend,
  reorder,
  split_layers,
  start_cache,
)
from narvl_jax.training.cross_entropy import label_smoothed_cross_entropy
from tests.models.recorded import (
  Outputs,
  Recorded,
  compare_gradients,
  compare_outputs,
  compare_weights,
  inputs,
  read_recorded,
)

CONFIG = model_config(
  "micro",
  decoder="autoregressive",
  resnet_width=64,
  max_text_positions=1026,
  image_bucket_size=42,
  vocab_size=252,
  dropout=0.0,
)
MODEL = Autoregressive(CONFIG)
PAD, EOS, FIRST_BIN = 1, 2, 202
# Room for every recorded answer, without eos.
LONGEST = 16


@jax.jit
def apply(variables: Any, image: Any, text: Any, mask: Any, tokens: Any) -> Any:
  """Logits and intermediates."""
  return MODEL.apply(variables, image, text, tokens, image_mask=mask)


@pytest.fixture(scope="module")
def recorded(shared_files: pathlib.Path) -> Recorded:
  return read_recorded(shared_files, "micro_ar", CONFIG)


@pytest.fixture(scope="module")
def variables(recorded: Recorded) -> Any:
  return jax.device_put(variables_from_official(recorded.state, CONFIG))


@pytest.fixture(scope="module")
def outputs(recorded: Recorded, variables: Any) -> Outputs:
  tokens, _ = forcing(recorded)
  return jax.device_get(apply(variables, *inputs(recorded), tokens))


def targets(recorded: Recorded) -> tuple[jax.Array, jax.Array]:
  """Labels and their numbers."""
  labels = jnp.asarray(recorded.arrays["target"], jnp.int32)
  return labels, jnp.sum(labels != PAD, axis=1)


def forcing(recorded: Recorded) -> tuple[jax.Array, jax.Array]:
  """Decoder input and places for the recorded targets, without a prompt."""
  _, text, _ = inputs(recorded)
  prompt = make_prompt(text, False, PAD)
  return teacher_forcing(prompt, *targets(recorded), PAD)


def test_weights(recorded: Recorded) -> None:
  compare_weights(recorded)


def test_teacher_forcing(recorded: Recorded) -> None:
  tokens, places = forcing(recorded)
  np.testing.assert_array_equal(tokens, recorded.arrays["prev_output_tokens"])
  np.testing.assert_array_equal(places, np.tile(np.arange(5), (3, 1)))


def test_outputs(recorded: Recorded, outputs: Outputs) -> None:
  compare_outputs(recorded, outputs)


def test_losses(recorded: Recorded, outputs: Outputs) -> None:
  labels, lengths = targets(recorded)
  for smoothing, mode, loss, nll, count in recorded.about["losses"]["rows"]:
    confidence = recorded.arrays["conf"] if mode == "conf" else np.ones(3)
    _, metrics = label_smoothed_cross_entropy(
      jnp.asarray(outputs[0]),
      labels,
      lengths,
      label_smoothing=smoothing,
      confidence=jnp.asarray(confidence),
    )
    assert float(metrics["weight"]) == count
    for name, expected in (("loss", loss), ("nll", nll)):
      assert float(metrics[name]) == pytest.approx(
        expected / count, abs=1e-4
      ), (smoothing, mode, name)


def test_gradients(recorded: Recorded) -> None:
  image, text, mask = inputs(recorded)
  tokens, _ = forcing(recorded)
  labels, lengths = targets(recorded)

  @jax.jit
  def gradient(params: Any, stats: Any) -> Any:
    def loss(params: Any) -> jax.Array:
      logits, _ = MODEL.apply(
        {"params": params, "batch_stats": stats},
        image,
        text,
        tokens,
        image_mask=mask,
      )  # pyright: ignore[reportGeneralTypeIssues]
      value, _ = label_smoothed_cross_entropy(
        logits, labels, lengths, label_smoothing=0.1
      )
      return value

    return jax.grad(loss)(params)

  variables = variables_from_official(recorded.state, CONFIG)
  grads = jax.device_get(gradient(*variables.values()))
  official = official_from_variables({"params": grads}, CONFIG)
  assert compare_gradients(recorded, "ls0.1", official) == 32


@pytest.mark.parametrize(
  "case", ["greedy", "beam5_refcoco", "beam5_caption", "greedy_prefix"]
)
def test_scores_of_answers(
  recorded: Recorded, variables: Any, case: str
) -> None:
  """Of every token of every hypothesis, in one pass without a cache."""
  about = recorded.about["generate"][case]
  image, text, mask = inputs(recorded)
  for hypotheses in zip(*about["hyps"], strict=True):
    labels = np.full((3, LONGEST + 1), PAD, np.int32)
    for row, hypothesis in zip(labels, hypotheses, strict=True):
      row[: len(hypothesis["tokens"])] = hypothesis["tokens"]
    lengths = (labels != PAD).sum(1)
    prompt = make_prompt(text, False, PAD)
    tokens, places = teacher_forcing(
      prompt, jnp.asarray(labels), jnp.asarray(lengths), PAD
    )
    logits, _ = apply(variables, image, text, mask, tokens)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    for i, hypothesis in enumerate(hypotheses):
      count = lengths[i]
      np.testing.assert_allclose(
        log_probs[i, places[i, :count], labels[i, :count]],
        hypothesis["positional_scores"],
        rtol=0,
        atol=1e-4,
      )


def encode(recorded: Recorded, variables: Any) -> Any:
  """What the decoder reads."""
  image, text, mask = inputs(recorded)
  program = jax.jit(
    lambda v: MODEL.apply(
      v, image, text, image_mask=mask, method=EncoderDecoder.encode
    ),
  )
  return program(variables)


@pytest.fixture(scope="module")
def encoded(recorded: Recorded, variables: Any) -> Any:
  return encode(recorded, variables)


@functools.partial(
  jax.jit,
  static_argnames=("beam", "ngram", "temperature"),
)
def search(
  params: Any,
  encoded: Any,
  prompt: Prompt,
  shortest: int,
  longest: int,
  constraint: Automaton | None,
  *,
  beam: int,
  ngram: int,
  temperature: float,
) -> dict[str, jax.Array]:
  """All hypotheses of a beam search, by log-probability."""
  decoder = split_layers(params["decoder"], CONFIG.decoder_layers)
  table = params["embed_tokens"]
  cache = start_cache(
    CONFIG,
    decoder,
    encoded,
    table,
    prompt,
    hypotheses=beam,
    length_limit=LONGEST + 1,
  )

  def step(tokens: jax.Array, t: jax.Array, cache: Any) -> Any:
    states, cache = extend(CONFIG, decoder, cache, table, tokens[..., None], t)
    return project(states[:, :, 0], table) / temperature, cache

  return beam_search(
    step,
    reorder,
    cache,
    prompt.ids[:, -1],
    eos_id=EOS,
    pad_id=PAD,
    beam_size=beam,
    length_limit=LONGEST,
    num_best=beam,
    min_length=shortest,
    max_length=longest,
    no_repeat_ngram=ngram,
    normalize=False,
    constraint=constraint,
    vocab_size=CONFIG.vocab_size,
  )


CASES = (
  "greedy",
  "greedy_unnormalized",
  "beam5",
  "beam5_refcoco",
  "beam5_caption",
  "beam5_unnormalized",
  "beam3_lenpen_temperature",
  "beam5_trie",
  "greedy_prefix",
  "beam3_prefix_trie",
)


def test_cases(recorded: Recorded) -> None:
  assert set(recorded.about["generate"]) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_generation(
  recorded: Recorded, variables: Any, encoded: Any, case: str
) -> None:
  """Tokens and scores of all hypotheses, in the official order."""
  about = recorded.about["generate"][case]
  options = about["options"]
  prefix = [FIRST_BIN + i for i in about["prefix_bins"] or ()]
  trie = about["trie_bins"]
  ids = jnp.tile(jnp.array([BOS_ID, *prefix], jnp.int32), (3, 1))
  found = jax.device_get(
    search(
      variables["params"],
      encoded,
      Prompt(ids, jnp.full(3, ids.shape[1], jnp.int32)),
      # The official code counts the prefix.
      max(options.get("min_len", 1) - len(prefix), 0),
      options["max_len_b"] - len(prefix),
      trie and answer_trie([[FIRST_BIN + i for i in word] for word in trie]),
      beam=options["beam"],
      ngram=options.get("no_repeat_ngram_size", 0),
      temperature=options.get("temperature", 1.0),
    )
  )
  power = options.get("lenpen", 1.0)
  power = 0.0 if options.get("unnormalized") else power
  for row, hypotheses in enumerate(about["hyps"]):
    lengths = found["lengths"][row] + 1 + len(prefix)
    # What the prompt costs is the same for all.
    forced = sum(hypotheses[0]["positional_scores"][: len(prefix)])
    scores = (found["log_probs"][row] + forced) / lengths**power
    order = np.argsort(-scores, kind="stable")
    assert len(hypotheses) == len(order)
    for k, hypothesis in zip(order, hypotheses, strict=True):
      count = found["lengths"][row, k]
      answer = found["ids"][row, k, :count].tolist()
      assert [*prefix, *answer, EOS] == hypothesis["tokens"]
      assert scores[k] == pytest.approx(hypothesis["score"], abs=1e-4)
