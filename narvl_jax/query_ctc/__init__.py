"""The Query-CTC loss and the decoding that belongs to it."""

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
