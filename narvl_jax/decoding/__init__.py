"""Decoding: from logits to token ids."""

from narvl_jax.decoding.greedy import greedy_decode, make_predict_step

__all__ = ["greedy_decode", "make_predict_step"]
