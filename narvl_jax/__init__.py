"""NARVL in JAX and Flax: answers in one parallel decoder pass."""

__version__ = "0.1.0"
