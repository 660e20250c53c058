"""Position tables of other sizes."""

import numpy as np
import pytest

from narvl_jax.models import positions, resizing


@pytest.mark.parametrize("side", [1, 2, 5])
def test_sides_are_those_of_the_tables(side: int) -> None:
  rows = positions.num_image_positions(side)
  assert resizing.positions_side(rows) == side
  assert resizing.positions_side(rows + 1) is None
  rows = positions.num_image_buckets(side)
  assert resizing.distances_side(rows) == side
  assert resizing.distances_side(rows + 1) is None
  assert resizing.distances_side(3) is None
  assert resizing.positions_side(1) is None


def test_stretching_a_plane() -> None:
  y, x = np.mgrid[:3, :4]
  plane = (2.0 * y - x)[..., None] + np.arange(2)
  got = np.asarray(resizing.stretch(plane, (5, 10)))
  # Twice and three times as fine: what was known stays.
  np.testing.assert_allclose(got[::2, ::3], plane, atol=1e-5)
  np.testing.assert_allclose(resizing.stretch(plane, (3, 4)), plane, atol=1e-6)
  mirrored = resizing.stretch(plane[::-1], (5, 10))
  np.testing.assert_allclose(mirrored, got[::-1], atol=1e-5)


def test_stretching_single_rows() -> None:
  row = np.array([[1.0, 2.0, 4.0]])[..., None]
  got = np.asarray(resizing.stretch(row, (4, 5)))
  np.testing.assert_allclose(got, np.broadcast_to(got[:1], got.shape))
  np.testing.assert_allclose(got[0, ::2, 0], row[0, :, 0], atol=1e-6)
  middle = resizing.stretch(row, (1, 1))
  np.testing.assert_allclose(middle, [[[2.0]]], atol=1e-6)


def test_a_larger_table_keeps_its_positions() -> None:
  table = np.arange(10.0).reshape(10, 1)
  fresh = -np.ones((17, 1))
  got = np.asarray(resizing.resize_positions(table, fresh, (2, 2), (2, 2)))
  assert got[0] == table[0]
  grid = got[1:].reshape(4, 4)
  np.testing.assert_array_equal(grid[:3, :3], np.arange(1, 10).reshape(3, 3))
  assert (grid[3] == -1).all()
  assert (grid[:, 3] == -1).all()


def test_a_smaller_table_keeps_its_own_entries() -> None:
  table = np.arange(17.0).reshape(17, 1)
  got = resizing.resize_positions(table, -np.ones((5, 1)), (2, 2), (2, 2))
  np.testing.assert_array_equal(np.asarray(got)[:, 0], [0, 1, 2, 5, 6])


def test_distances_keep_their_places() -> None:
  """A distance finds the same value in a table of another size."""
  small, large = 2, 3
  rows = [positions.num_image_buckets(side) for side in (small, large)]
  rng = np.random.default_rng(0)
  tables = [rng.normal(size=(count, 2)).astype(np.float32) for count in rows]
  for n, m in ((0, 1), (1, 0)):
    table, fresh = tables[n], tables[m]
    got = np.asarray(resizing.resize_distances(table, fresh, (2, 2), (2, 2)))
    assert got.shape == fresh.shape
    sides = [(small, large)[i] for i in (n, m)]
    before, after = (positions.image_buckets(2, 2, side) for side in sides)
    np.testing.assert_array_equal(got[after], table[before])
    np.testing.assert_array_equal(got[-3:], table[-3:])
  # What only the larger table knows stays fresh.
  got = resizing.resize_distances(tables[0], tables[1], (2, 2), (2, 2))
  np.testing.assert_array_equal(np.asarray(got)[0], tables[1][0])


def test_distances_are_stretched_with_the_grid() -> None:
  dy, dx = np.mgrid[-2:3, -2:3]
  slope = (dy + 3.0 * dx)[..., None] * np.array([1.0, 2.0])
  table = np.concatenate([slope.reshape(25, 2), np.ones((3, 2))])
  fresh = np.zeros((positions.num_image_buckets(5), 2))
  got = resizing.resize_distances(table, fresh, (3, 2), (5, 3))
  grid = np.asarray(got)[:81].reshape(9, 9, 2)
  # Rows 2 apart on the old grid are 4 apart on the new one, columns 1 and 2.
  np.testing.assert_allclose(grid[::2, 2:7:2], slope[:, 1:4], atol=1e-5)
