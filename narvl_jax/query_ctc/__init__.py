"""The Query-CTC loss and the decoding that belongs to it."""

from narvl_jax.query_ctc.compact import feasible
from narvl_jax.query_ctc.decoding import collapse
from narvl_jax.query_ctc.loss import (
  CONFIDENCE_MODES,
  query_ctc_loss,
  query_ctc_objective,
)

__all__ = [
  "CONFIDENCE_MODES",
  "collapse",
  "feasible",
  "query_ctc_loss",
  "query_ctc_objective",
]
