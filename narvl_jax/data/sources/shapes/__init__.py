"""Procedural scenes of coloured shapes for all four tasks."""

from narvl_jax.data.sources.shapes.source import ShapesSource

__all__ = ["ShapesSource"]
