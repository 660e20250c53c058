"""Counts the floating-point operations of a traced function."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def matmul_flops(function: Callable[..., Any], *args: Any) -> float:
  """Counts the operations of matrix products and convolutions.

  A product of [m, k] and [k, n] counts 2 m k n. Bodies of scans count once
  per iteration, which the compiler's own cost analysis leaves out.

  Args:
    function: is traced but not run.
    *args: arrays or `jax.ShapeDtypeStruct`s.
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = _shape(equation.invars[0])
      depth = math.prod(left[axis] for axis in contracted)
      total += 2.0 * depth * math.prod(_shape(equation.outvars[0]))
    elif name == "conv_general_dilated":
      kernel = _shape(equation.invars[1])
      spec = equation.params["dimension_numbers"].rhs_spec
      per_output = math.prod(kernel) / kernel[spec[0]]
      total += 2.0 * per_output * math.prod(_shape(equation.outvars[0]))
    repeats = equation.params.get("length", 1) if name == "scan" else 1
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(inner, core.ClosedJaxpr):
          total += repeats * _count(inner.jaxpr)
        elif isinstance(inner, core.Jaxpr):
          total += repeats * _count(inner)
  return total


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape
