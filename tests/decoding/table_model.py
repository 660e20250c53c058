"""A decoder that looks its logits up, and answers that it may give."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from narvl_jax.decoding.constraint import Automaton

BOS, PAD, EOS = 0, 1, 2
BATCH, CLASSES, ROWS, EDGES = 4, 8, 97, 24


class Model(NamedTuple):
  """A table of logits, indexed by a summary of all previous tokens.

  Attributes:
    table: float32 [B, ROWS, V].
    factor: int32 [B]; 0: the row depends on the last token and its place
      alone. Without the place, paths of equal steps in another order would tie
      up to rounding.
    seen: int32 [B, K], summary of the previous tokens; the cache.
  """

  table: Any
  factor: Any
  seen: Any


def _row(factor, seen, token, t):
  """Returns the row; for Python's integers and arrays."""
  return (factor * seen + token + 13 * t + 1) % ROWS


def step(tokens, t, model: Model):
  row = _row(model.factor[:, None], model.seen, tokens, t)
  logits = model.table[jnp.arange(len(tokens))[:, None], row]
  return logits, model._replace(seen=row)


def reorder(model: Model, parents):
  seen = jnp.take_along_axis(model.seen, parents, axis=1)
  return model._replace(seen=seen)


def logits_of(model: Model, i: int, first: int, said):
  row = 0
  for t, token in enumerate([first, *said]):
    row = _row(int(model.factor[i]), row, token, t)
  return model.table[i, row]


def random_model(rng, beam: int, classes: int = CLASSES) -> Model:
  table = 2 * rng.normal(size=(BATCH, ROWS, classes))
  table[..., EOS] += rng.choice([-2, 0, 3], size=(BATCH, 1))
  return Model(
    table.astype(np.float32),
    rng.choice([0, 31, 37], size=BATCH).astype(np.int32),
    np.zeros((BATCH, beam), np.int32),
  )


def random_answers(rng) -> list[tuple[int, ...]]:
  words = [i for i in range(CLASSES) if i not in (PAD, EOS)]
  answers = {
    tuple(map(int, rng.choice(words, rng.integers(1, 4))))
    for _ in range(rng.integers(1, 9))
  }
  return sorted(answers)


def fixed_shape(trie: Automaton) -> Automaton:
  """As many edges and states for every trie, for each shape compiles."""
  more = EDGES - len(trie.source)
  # No walk is ever in state -1.
  source = np.pad(trie.source, (0, more), constant_values=-1)
  token, target = (np.pad(x, (0, more)) for x in (trie.token, trie.target))
  ends = np.pad(trie.accepting, (0, EDGES + 1 - len(trie.accepting)))
  return Automaton(source, token, target, accepting=ends)
