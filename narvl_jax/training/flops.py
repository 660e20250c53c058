"""Floating-point operations of a step, and the peak rate of devices.

Only matrix products and convolutions count, with two operations per
multiply-add.
"""

from typing import Any

from narvl_jax.models import ModelConfig

# Dense bf16 peak of one device, FLOP/s, as published by the makers.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops(device: Any) -> float | None:
  """Returns the bf16 peak of a device in FLOP/s, None if it is not known."""
  return PEAK_FLOPS.get(device.device_kind)


# An update costs three forward passes: the gradient of a product takes two
# products of its size. Recomputation (`remat`, chunked head) does not count.
UPDATE_FACTOR = 3.0


def forward_flops(
  config: ModelConfig,
  image_size: tuple[int, int],
  text_length: int,
  batch_size: int,
  answer: tuple[int, int] | None = None,
) -> float:
  """Returns the operations of a forward pass.

  With D the model width, F the hidden width of a feed-forward block, N the
  queries, V the padded vocabulary, I the image tokens, C their channels and S
  the source tokens, image and text:

      encoder layer   2 S D (4 D + 2 S + 2 F)
      decoder layer   2 N D (6 D + 2 N + 2 S + 2 F) + 4 S D^2
      head            2 N D V
      image tokens    2 I C D, and the image encoder
      positions       once per batch, see `position_flops`

  Args:
    config: the model.
    image_size: (height, width) in pixels.
    text_length: source tokens T, padding included.
    batch_size: number of examples.
    answer: number of tokens that an autoregressive decoder reads, and of those
      that are projected to the vocabulary; None for N queries.
  """
  read, projected = answer or (config.num_queries, config.num_queries)
  stride = config.image_stride
  image = _ceil(image_size[0], stride) * _ceil(image_size[1], stride)
  source = image + text_length
  channels = 2 * config.width
  if config.image_encoder == "resnet":
    channels = 16 * config.resnet_width
  example = (
    image_encoder_flops(config, image_size)
    + 2 * image * channels * config.width
    + config.encoder_layers * encoder_layer_flops(config, source)
    + config.decoder_layers * decoder_layer_flops(config, source, read)
    + 2 * projected * config.width * config.padded_vocab_size
  )
  return float(batch_size * example + position_flops(config, source, read))


def encoder_layer_flops(config: ModelConfig, source: int) -> int:
  """Returns the operations of an encoder layer for one example."""
  d, f = config.width, config.mlp_width
  # Queries, keys, values and output; logits and weighted values; two products.
  return 2 * source * d * (4 * d + 2 * source + 2 * f)


def decoder_layer_flops(config: ModelConfig, source: int, n: int) -> int:
  """Returns the operations of a decoder layer for n tokens of one example."""
  d, f = config.width, config.mlp_width
  # Four products in self-attention, two in cross-attention.
  queries = 2 * n * d * (6 * d + 2 * n + 2 * source + 2 * f)
  # Keys and values of the source.
  return queries + 2 * source * d * 2 * d


def position_flops(config: ModelConfig, source: int, n: int) -> int:
  """Returns the operations of the position biases, once per batch.

  In encoder, decoder and cross-attention, positions [Q, D] and [K, D] are
  projected and multiplied to [H, Q, K].
  """
  d = config.width

  def bias(queries: int, keys: int) -> int:
    return 2 * d * (d * (queries + keys) + queries * keys)

  return bias(source, source) + bias(n, n) + bias(n, source)


def image_encoder_flops(
  config: ModelConfig, image_size: tuple[int, int]
) -> int:
  """Returns the operations of the image encoder for one picture."""
  if config.image_encoder == "resnet":
    return _resnet_flops(config, image_size)
  half, narrow = config.patch_size // 2, config.width // 2
  fine = (image_size[0] // half) * (image_size[1] // half)
  coarse = _ceil(image_size[0] // half, 2) * _ceil(image_size[1] // half, 2)
  return 2 * (
    fine * half * half * 3 * narrow
    + fine * 9 * narrow * narrow
    + coarse * 9 * narrow * 2 * config.width
  )


def _resnet_flops(config: ModelConfig, image_size: tuple[int, int]) -> int:
  """Stem of 7x7 / 2 and pooling / 2, then stages of bottleneck blocks."""
  height, width = (_ceil(side, 2) for side in image_size)
  total = 2 * height * width * 7 * 7 * 3 * config.resnet_width
  height, width = _ceil(height, 2), _ceil(width, 2)
  channels = config.resnet_width
  for stage, blocks in enumerate(config.resnet_blocks):
    narrow, before = config.resnet_width * 2**stage, height * width
    if stage:
      height, width = _ceil(height, 2), _ceil(width, 2)
    pixels, wide = height * width, 4 * narrow
    # 1x1 to narrow, 3x3 with the stride, 1x1 to wide; the shortcut.
    total += 2 * before * channels * narrow
    total += 2 * pixels * (9 * narrow * narrow + narrow * wide)
    total += 2 * pixels * channels * wide
    # The other blocks: wide to narrow, 3x3, narrow to wide.
    block = 2 * pixels * (2 * wide * narrow + 9 * narrow * narrow)
    total += (blocks - 1) * block
    channels = wide
  return total


def _ceil(value: int, divisor: int) -> int:
  return -(-value // divisor)
