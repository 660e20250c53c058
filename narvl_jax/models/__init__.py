"""The networks, as `flax.linen` modules.

Letters of the shapes: B batch, N queries, L labels, S source tokens (image
first, then text), T text tokens, H heads, D model width, d head width, V
vocabulary, G parts of the batch (1 without a mesh).

| module | counterpart in the official code, `models/ofa/` |
| --- | --- |
| `narvl`, `decoder.QueryDecoder` | `ofa_nat.py`, `ofa_cmlm_transformer.py` |
| `autoregressive`, `decoder.CausalDecoder` | `unify_transformer.py` |
| `encoder` | the encoder of `ofa_cmlm_transformer.py` |
| `transformer` | `unify_transformer_layer.py` |
| `attention` | `unify_multihead_attention.py` |
| `resnet` | `resnet.py` |
"""

from narvl_jax.models.autoregressive import Autoregressive
from narvl_jax.models.encoder_decoder import EncoderDecoder, project
from narvl_jax.models.narvl import NARVL
from narvl_jax.models.sizes import SIZES, ModelConfig, model_config

__all__ = [
  "NARVL",
  "SIZES",
  "Autoregressive",
  "EncoderDecoder",
  "ModelConfig",
  "make_model",
  "model_config",
  "project",
]


def make_model(config: ModelConfig) -> NARVL | Autoregressive:
  """Returns the network with the decoder that `config.decoder` names."""
  if config.decoder == "autoregressive":
    return Autoregressive(config)
  return NARVL(config)
