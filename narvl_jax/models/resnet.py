"""ResNet v1.5 without its last stage: the image encoder of the reference."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from narvl_jax.kernels.linear_bias import add_to_rows
from narvl_jax.kernels.product import product
from narvl_jax.models.attention import ones_init, zeros_init
from narvl_jax.models.sizes import ModelConfig
from narvl_jax.parallel.constraints import constrain, gathered, platform

_EPSILON = 1e-5
_MOMENTUM = 0.1

_AXES = ("conv_height", "conv_width", "conv_in", "conv_out")
_conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

# The backward pass keeps these of a bottleneck and recomputes the rest, which
# is cheaper than reading it from memory.
_KEPT = jax.checkpoint_policies.save_only_these_names("conv", "statistics")


class Conv(nn.Module):
  """Convolution with explicit symmetric padding.

  At stride 2, "SAME" would pad even sizes by (0, 1) and shift the features
  relative to PyTorch's.

  Attributes:
    features: output channels.
    size: side of the kernel.
    stride: in both directions.
    padding: zeros on every side; None for `size // 2`.
    use_bias: whether to add a bias.
    kernel_init: initializer without axis names.
  """

  config: ModelConfig
  features: int
  size: int = 1
  stride: int = 1
  padding: int | None = None
  use_bias: bool = False
  kernel_init: nn.initializers.Initializer = _conv_init

  @nn.compact
  def __call__(
    self, x: jax.Array, factor: jax.Array | None = None
  ) -> jax.Array:
    """Maps [B, H, W, C] to [B, H / stride, W / stride, features].

    Args:
      x: the input.
      factor: scales the kernel, float32 [features].
    """
    init: Any = nn.with_logical_partitioning(self.kernel_init, _AXES)
    kernel = self.param(
      "kernel",
      init,
      (self.size, self.size, x.shape[-1], self.features),
    )
    padding = self.size // 2 if self.padding is None else self.padding
    if factor is not None:
      kernel *= factor
    kernel = gathered(kernel, x.dtype, *_AXES)
    if self.size == 1:
      # The kernel's gradient as a convolution is slow on CPUs.
      x = product(x[:, :: self.stride, :: self.stride], kernel[0, 0])
    else:
      x = jax.lax.conv_general_dilated(
        x,
        kernel,
        (self.stride, self.stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
    x = checkpoint_name(x, "conv")
    if self.use_bias:
      bias = self.param("bias", zeros_init("conv_out"), (self.features,))
      x += gathered(bias, x.dtype, "conv_out")
    return x


class BatchNorm(nn.Module):
  """A convolution with batch normalisation by PyTorch's running statistics.

  Normalises with the biased variance and updates the running variance with
  the unbiased one; Flax's layer uses the biased one for both. If the batch is
  sharded, the statistics are those of the global batch. They are computed in
  one pass, as moments about the running mean, so that a large mean does not
  cancel the digits of the variance.

  Training with frozen statistics scales the kernel instead of its output. The
  gradient of the scale is then a sum over the kernel, and the output need not
  be kept.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, conv: Conv, x: jax.Array, train: bool) -> jax.Array:
    """Returns the normalised convolution of x [B, H, W, C]."""
    channels = conv.features
    scale = self.param("scale", ones_init("norm"), (channels,))
    bias = self.param("bias", zeros_init("norm"), (channels,))
    mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    var = self.variable("batch_stats", "var", jnp.ones, (channels,))
    if train and self.config.batch_norm == "frozen":
      factor = scale * jax.lax.rsqrt(var.value + _EPSILON)
      shift = bias - mean.value * factor
      return add_to_rows(conv(x, factor), shift.astype(x.dtype))
    x = conv(x)
    if train:
      shifted = x.astype(jnp.float32) - mean.value
      first = checkpoint_name(shifted.mean((0, 1, 2)), "statistics")
      second = jnp.square(shifted).mean((0, 1, 2))
      second = checkpoint_name(second, "statistics")
      batch_mean = mean.value + first
      batch_var = jnp.maximum(second - jnp.square(first), 0.0)
      if not self.is_initializing():
        count = x.size // channels
        unbiased = batch_var * (count / max(count - 1, 1))
        mean.value += _MOMENTUM * (batch_mean - mean.value)
        var.value += _MOMENTUM * (unbiased - var.value)
    else:
      batch_mean, batch_var = mean.value, var.value
    factor = scale * jax.lax.rsqrt(batch_var + _EPSILON)
    shift = bias - batch_mean * factor
    return x * factor.astype(x.dtype) + shift.astype(x.dtype)


class Bottleneck(nn.Module):
  """1x1, 3x3 (strided), 1x1 convolutions with a residual connection."""

  config: ModelConfig
  features: int
  stride: int = 1
  train: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    """Maps [B, H, W, C] to [B, H / stride, W / stride, 4 * features].

    The last ReLU is that of the next block, whose input is then all that the
    backward pass needs of it.
    """
    cfg, train, out = self.config, self.train, 4 * self.features
    x = nn.relu(x)

    def conv(name: str, features: int, size: int = 1, stride: int = 1) -> Conv:
      return Conv(cfg, features, size, stride, name=name)

    h = BatchNorm(cfg, name="bn1")(conv("conv1", self.features), x, train)
    middle = conv("conv2", self.features, 3, self.stride)
    h = BatchNorm(cfg, name="bn2")(middle, nn.relu(h), train)
    h = BatchNorm(cfg, name="bn3")(conv("conv3", out), nn.relu(h), train)
    if x.shape != h.shape:
      down = conv("downsample_conv", out, 1, self.stride)
      x = BatchNorm(cfg, name="downsample_bn")(down, x, train)
    return constrain(x + h, "batch", None, None, None), None


def _max_pool(x: jax.Array) -> jax.Array:
  """Takes maxima of 3 x 3 pixels of x [B, H, W, C] at stride 2, before a ReLU.

  XLA's operation for windows, and its gradient, are slow on a CPU, where zeros
  are the padding.
  """
  if platform() != "cpu":
    padding: Any = [(1, 1), (1, 1)]  # Flax annotates it as str only.
    return nn.max_pool(x, (3, 3), (2, 2), padding)
  for axis in (1, 2):
    size = x.shape[axis]
    end = (size - 1) // 2 * 2 + 1
    padding = [(1, 1) if i == axis else (0, 0) for i in range(4)]
    padded = jnp.pad(x, padding)
    parts = [
      jax.lax.slice_in_dim(padded, i, i + end, 2, axis) for i in range(3)
    ]
    x = functools.reduce(jnp.maximum, parts)
  return x


class ResNet(nn.Module):
  """Stem and three bottleneck stages with total stride 16."""

  config: ModelConfig

  @nn.compact
  def __call__(self, image: jax.Array, train: bool) -> jax.Array:
    """Maps an image [B, H, W, 3] in [-1, 1] to features [B, H/16, W/16, C].

    The blocks of a stage after the first are identical. They run as one scan,
    so that compile time does not grow with depth. Training on a CPU unrolls
    it, because XLA's fast convolutions are not available within a loop there.
    """
    cfg = self.config
    unroll = train and platform() == "cpu"
    # On CPUs, XLA schedules what should be recomputed into the forward pass.
    block = (
      Bottleneck
      if unroll
      else nn.remat(Bottleneck, policy=_KEPT, prevent_cse=False)
    )
    stem = Conv(cfg, cfg.resnet_width, 7, 2, name="conv1")
    x = BatchNorm(cfg, name="bn1")(stem, image.astype(cfg.dtype), train)
    x = _max_pool(x)
    for stage, blocks in enumerate(cfg.resnet_blocks):
      features = cfg.resnet_width * 2**stage
      stride = 1 if stage == 0 else 2
      name = f"layer{stage + 1}"
      x, _ = block(cfg, features, stride, train, name=f"{name}_first")(x)
      if blocks > 1:
        rest = nn.scan(
          block,
          variable_axes={"params": 0, "batch_stats": 0},
          split_rngs={"params": True},
          length=blocks - 1,
          unroll=blocks - 1 if unroll else 1,
          metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = rest(cfg, features, 1, train, name=f"{name}_rest")(x, None)
    return nn.relu(x)
