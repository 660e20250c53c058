"""Configuration of the modules, and the named sizes."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.parallel.constraints import device_kind, platform

REMAT_POLICIES = ("none", "dots", "full")
BATCH_NORM_MODES = ("frozen", "batch")
IMAGE_ENCODERS = ("resnet", "conv")
DECODERS = ("parallel", "autoregressive")
ATTENTIONS = ("auto", "xla", "heads", "blocks", "pallas", "cudnn")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything that determines the parameters and the forward pass.

  The named sizes reproduce the reference (arXiv 2403.02249, official code).
  Fields marked "beyond the reference" depart from it; they are off in those
  sizes.

  Attributes:
    width: model width D.
    mlp_width: hidden width F of the feed-forward blocks.
    num_heads: attention heads H; D must divide by it.
    encoder_layers: encoder depth.
    decoder_layers: decoder depth.
    resnet_blocks: bottleneck blocks in each of the three stages.
    resnet_width: channels of the stem; the output has 16 times as many.
    decoder: "parallel" answers in one pass (NARVL), "autoregressive" token by
      token (OFA).
    num_queries: learned queries N of the parallel decoder, the length of the
      CTC input.
    vocab_size: number of classes V. Those of the parallel decoder include
      blank, the last class.
    vocab_multiple: the tied table is padded to a multiple of this.
    pad_id: id of padding in the text.
    max_text_positions: rows of each token position table.
    token_bucket_size: relative token distances have 2 * size - 1 buckets.
    image_bucket_size: largest side of the image grid, in tokens.
    dropout: dropout rate of embeddings and residual branches.
    encoder_drop_path: stochastic depth of the last encoder layer.
    decoder_drop_path: stochastic depth of the last decoder layer.
    batch_norm: "batch" trains with the statistics of the global batch
      (reference), "frozen" with the running statistics.
    remat: what the backward pass recomputes: "none", "dots" (all but matrix
      products with weights), "full" (each layer from its input). Outputs of
      attention and masks of dropout are always kept.
    attention: how the encoder computes attention: "xla" with all weights in
      memory, "heads" with one head at a time, "blocks" with some queries at a
      time, "pallas" by the kernel for TPU, "cudnn" by that for GPU; "auto" is
      "pallas" on TPU from v5 on, "heads" on CPU, otherwise "xla".
    scan_unroll: layers in one iteration of the layer scan.
    init_stddev: standard deviation of the linear maps at initialisation. With
      the reference's 0.02 a narrow model starts with uniform attention and
      almost linear feed-forward blocks; width ** -0.5 avoids that.
    dtype: compute type of activations; parameters are float32.
    image_encoder: "resnet" (reference), or "conv": three convolutions, for
      small runs on a CPU (beyond the reference).
    patch_size: side of a token of "conv" in pixels; even.
    entangle_positions: add absolute positions also to the token content, not
      only to the attention logits, and initialise those of the image with
      sines and cosines (beyond the reference; `configs/shapes.py` records its
      effect).
  """

  width: int
  mlp_width: int
  num_heads: int
  encoder_layers: int
  decoder_layers: int
  resnet_blocks: tuple[int, int, int]
  resnet_width: int = 64
  decoder: str = "parallel"
  num_queries: int = 20
  vocab_size: int = 59458
  vocab_multiple: int = 128
  pad_id: int = 1
  max_text_positions: int = 1026
  token_bucket_size: int = 256
  image_bucket_size: int = 42
  dropout: float = 0.1
  encoder_drop_path: float = 0.0
  decoder_drop_path: float = 0.0
  batch_norm: str = "batch"
  remat: str = "none"
  attention: str = "auto"
  scan_unroll: int = 1
  init_stddev: float = 0.02
  dtype: Any = jnp.float32
  image_encoder: str = "resnet"
  patch_size: int = 8
  entangle_positions: bool = False

  def __post_init__(self) -> None:
    """Checks the fields; raises UserError."""
    self._check_numbers()
    if self.width % self.num_heads:
      raise UserError(
        f"model.width={self.width} does not divide by "
        f"model.num_heads={self.num_heads}; nearest width: "
        f"{max(1, round(self.width / self.num_heads)) * self.num_heads} "
        "(--config.model.width)"
      )
    for name, choices in (
      ("remat", REMAT_POLICIES),
      ("attention", ATTENTIONS),
      ("batch_norm", BATCH_NORM_MODES),
      ("image_encoder", IMAGE_ENCODERS),
      ("decoder", DECODERS),
    ):
      value = getattr(self, name)
      if value not in choices:
        raise UserError(
          f'model.{name}="{value}" is unknown.{did_you_mean(value, choices)}'
          f" (--config.model.{name})"
        )

    if self.attention == "cudnn" and (
      jnp.dtype(self.dtype) == jnp.float32 or self.head_width > 120
    ):
      raise UserError(
        f'model.attention="cudnn" does not take heads of {self.head_width} in'
        f" {jnp.dtype(self.dtype).name}, only of at most 120 in bfloat16;"
        ' nearest: "blocks" (--config.model.attention)'
      )

  def _check_numbers(self) -> None:
    """Raises UserError for a count below 1 or a rate outside [0, 1)."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and field.name != "pad_id" and value < 1:
        raise UserError(
          f"model.{field.name}={value} must be at least 1 "
          f"(--config.model.{field.name})"
        )
    for name in ("dropout", "encoder_drop_path", "decoder_drop_path"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(
          f"model.{name}={getattr(self, name)} must be in [0, 1) "
          f"(--config.model.{name})"
        )
    if not 0 < self.init_stddev < math.inf:
      raise UserError(
        f"model.init_stddev={self.init_stddev} must be above 0 and finite, such"
        " as 0.02 (--config.model.init_stddev)"
      )
    if self.image_encoder == "conv" and self.patch_size % 2:
      raise UserError(
        f"model.patch_size={self.patch_size} must be even, such as "
        f"{self.patch_size + 1} (--config.model.patch_size)"
      )
    blocks = self.resnet_blocks
    if len(blocks) != 3 or not all(type(x) is int and x > 0 for x in blocks):
      raise UserError(
        f"model.resnet_blocks={self.resnet_blocks} must be three numbers of "
        "at least 1 (--config.model.resnet_blocks)"
      )
    if self.num_queries > self.max_text_positions:
      raise UserError(
        f"model.num_queries={self.num_queries} exceeds "
        f"model.max_text_positions={self.max_text_positions} "
        "(--config.model.num_queries)"
      )

  @property
  def head_width(self) -> int:
    """Width d of one attention head."""
    return self.width // self.num_heads

  @property
  def attention_method(self) -> str:
    """`attention`, with "auto" resolved for the platform of the program."""
    if self.attention != "auto":
      return self.attention
    # The VMEM of older chips is too small for the kernel.
    old = device_kind() in ("TPU v2", "TPU v3", "TPU v4")
    methods = {"cpu": "heads", "tpu": "xla" if old else "pallas"}
    return methods.get(platform(), "xla")

  @property
  def padded_vocab_size(self) -> int:
    """Rows of the tied table; those from `vocab_size` on are padding."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @property
  def image_stride(self) -> int:
    """Side of an image token in pixels."""
    return 16 if self.image_encoder == "resnet" else self.patch_size


# Sizes of the official code, and `micro` for tests and small data.
_SIZES: dict[str, dict[str, Any]] = {
  "micro": {
    "width": 64,
    "mlp_width": 128,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "resnet_blocks": (1, 1, 1),
    "resnet_width": 16,
    "max_text_positions": 130,
    "image_bucket_size": 16,
  },
  "tiny": {
    "width": 256,
    "mlp_width": 1024,
    "num_heads": 4,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "resnet_blocks": (3, 4, 6),
  },
  "medium": {
    "width": 512,
    "mlp_width": 2048,
    "num_heads": 8,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "resnet_blocks": (3, 4, 23),
  },
  "base": {
    "width": 768,
    "mlp_width": 3072,
    "num_heads": 12,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "resnet_blocks": (3, 4, 23),
  },
  "large": {
    "width": 1024,
    "mlp_width": 4096,
    "num_heads": 16,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "resnet_blocks": (3, 8, 36),
  },
  "huge": {
    "width": 1280,
    "mlp_width": 5120,
    "num_heads": 16,
    "encoder_layers": 24,
    "decoder_layers": 12,
    "resnet_blocks": (3, 8, 36),
  },
}

SIZES = tuple(_SIZES)


def model_config(size: str, **overrides: Any) -> ModelConfig:
  """Returns the configuration of a named size, with some fields replaced.

  Args:
    size: one of `SIZES`.
    **overrides: fields of `ModelConfig`.

  Raises:
    UserError: unknown size or field, or incompatible values.
  """
  if size not in _SIZES:
    raise UserError(
      f'model.size="{size}" is unknown.{did_you_mean(size, _SIZES)}'
      " (--config.model.size)"
    )
  fields = {f.name for f in dataclasses.fields(ModelConfig)}
  for name in overrides:
    if name not in fields:
      raise UserError(
        f"model.{name} is not a setting of the model."
        f"{did_you_mean(name, fields)} (--config.model.{name})"
      )
  merged = {**_SIZES[size], **overrides}
  merged["resnet_blocks"] = tuple(merged["resnet_blocks"])
  return ModelConfig(**merged)
