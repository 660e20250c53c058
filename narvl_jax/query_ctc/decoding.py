"""The CTC map from one class a query to a sequence of labels."""

import jax
import jax.numpy as jnp


def collapse(
  token_ids: jax.Array,
  *,
  blank_id: int,
  pad_id: int,
  merge_repeats: bool | jax.Array = True,
) -> tuple[jax.Array, jax.Array]:
  """Merges runs of equal ids, then drops blanks and pads.

  Args:
    token_ids: [B, N] integers, the best class of every query.
    blank_id: id of the blank class.
    pad_id: dropped like blank, and fills the tail of the result.
    merge_repeats: whether a run of equal ids becomes one; bool for all rows or
      bool [B]. Boxes, which have equal neighbours and no queries for blanks
      between them, do not merge.

  Returns:
    Ids [B, N] of the dtype of `token_ids`, left packed, and lengths int32 [B].

  Source: Graves et al. 2006, section 3.1, the map B.
  """
  repeated = jnp.pad(token_ids[:, 1:] == token_ids[:, :-1], ((0, 0), (1, 0)))
  merge = jnp.broadcast_to(jnp.asarray(merge_repeats), token_ids.shape[:1])
  keep = (token_ids != blank_id) & (token_ids != pad_id)
  keep &= ~(repeated & merge[:, None])
  order = jnp.argsort(~keep, axis=1, stable=True)
  packed = jnp.take_along_axis(token_ids, order, axis=1)
  lengths = jnp.sum(keep, axis=1, dtype=jnp.int32)
  tail = jnp.arange(token_ids.shape[1]) >= lengths[:, None]
  return jnp.where(tail, jnp.asarray(pad_id, token_ids.dtype), packed), lengths
