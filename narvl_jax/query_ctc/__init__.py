"""The Query-CTC loss and its decoding; usable without the rest of the package.

A decoder with 4 queries predicts over 3 classes and blank, the last:

>>> import jax
>>> import jax.numpy as jnp
>>> from narvl_jax.query_ctc import collapse, query_ctc_loss
>>> logits = jnp.zeros((1, 4, 4))  # [batch, queries, classes]
>>> labels, lengths = jnp.array([[0, 2, 0]]), jnp.array([2])  # 0 2, padded
>>> @jax.jit
... @jax.grad
... def gradient(logits):
...   losses = query_ctc_loss(logits, labels, lengths, blank_id=3)
...   return losses.mean()
>>> for _ in range(50):  # gradient descent on the logits themselves
...   logits -= gradient(logits)
>>> ids, lengths = collapse(logits.argmax(-1), blank_id=3, pad_id=-1)
>>> ids.tolist(), lengths.tolist()
([[0, 2, -1, -1]], [2])

A target needs one query a label, and one more between equal neighbours
(`feasible`). `ChunkedLogits` saves the memory of the logits, `MeshAxes` splits
the classes over devices, and `query_ctc_objective` is the loss of a training
step. The module `prefix_beam_search` finds the likeliest label sequences.
"""

from narvl_jax.query_ctc.axes import MeshAxes
from narvl_jax.query_ctc.chunked import ChunkedLogits
from narvl_jax.query_ctc.decoding import collapse
from narvl_jax.query_ctc.loss import (
  CONFIDENCE_MODES,
  query_ctc_loss,
  query_ctc_objective,
)
from narvl_jax.query_ctc.posterior import label_posterior
from narvl_jax.query_ctc.targets import feasible

__all__ = [
  "CONFIDENCE_MODES",
  "ChunkedLogits",
  "MeshAxes",
  "collapse",
  "feasible",
  "label_posterior",
  "query_ctc_loss",
  "query_ctc_objective",
]
