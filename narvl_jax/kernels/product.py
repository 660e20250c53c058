"""Products with a weight, for which a CPU gets fast gradients."""

import jax

from narvl_jax.parallel.constraints import platform


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns x @ kernel for x [..., D] and a kernel [D, F].

  On a CPU the leading axes are one axis: XLA transposes the argument of the
  kernel's gradient if it sums over several axes, which takes longer than the
  product.
  """
  if platform() != "cpu":
    return x @ kernel
  return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)
