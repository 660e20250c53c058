"""Buckets of relative positions and ids of absolute ones."""

import numpy as np
import pytest

from narvl_jax.models import positions


@pytest.mark.parametrize(
  ("query", "key", "bucket"),
  [
    (0, 0, 255),
    (1, 0, 256),
    (0, 1, 254),
    (128, 0, 383),
    (129, 0, 384),
    (200, 0, 411),
    (0, 200, 99),
    (1023, 0, 510),
    (0, 1023, 0),
  ],
)
def test_token_buckets_of_the_reference(
  query: int, key: int, bucket: int
) -> None:
  assert positions.token_buckets(1024)[query, key] == bucket


@pytest.mark.parametrize(("size", "length"), [(256, 1026), (16, 200), (2, 40)])
def test_token_buckets_stay_in_the_table(size: int, length: int) -> None:
  buckets = positions.token_buckets(length, size)
  rows = positions.num_token_buckets(size)
  assert buckets.dtype == np.int32
  assert buckets.min() >= 0
  assert buckets.max() < rows
  # Order is kept, and the two directions mirror each other.
  assert (np.diff(buckets[:, 0]) >= 0).all()
  np.testing.assert_array_equal(buckets + buckets.T, rows - 1)


def test_token_buckets_do_not_depend_on_the_length() -> None:
  np.testing.assert_array_equal(
    positions.token_buckets(300)[:40, :40], positions.token_buckets(40)
  )


@pytest.mark.parametrize(
  ("query", "key", "bucket"),
  [(1, 1, 3444), (1, 2, 3443), (2, 1, 3445), (1, 43, 3361), (43, 1, 3527)],
)
def test_image_buckets_of_the_reference(
  query: int, key: int, bucket: int
) -> None:
  ids = positions.image_position_ids(42, 42).tolist()
  table = positions.image_buckets(42, 42)
  assert table[ids.index(query), ids.index(key)] == bucket


def test_image_ids_run_along_rows_of_the_largest_grid() -> None:
  assert positions.image_position_ids(2, 3).tolist() == [1, 2, 3, 43, 44, 45]
  assert positions.image_position_ids(2, 2, 5).tolist() == [1, 2, 6, 7]
  assert positions.image_position_ids(42, 42).max() == 42 * 42
  assert positions.num_image_positions(42) == 1765


@pytest.mark.parametrize("size", [3, 42])
def test_image_buckets_stay_in_the_table(size: int) -> None:
  buckets = positions.image_buckets(size, size, size)
  assert buckets.min() == 0
  # The last three rows belong to the id 0.
  assert buckets.max() == positions.num_image_buckets(size) - 4
  assert len(np.unique(buckets)) == (2 * size - 1) ** 2


def test_image_buckets_do_not_depend_on_the_grid() -> None:
  small = positions.image_buckets(2, 3)
  ids = positions.image_position_ids(2, 3)
  rows = [positions.image_position_ids(7, 9).tolist().index(i) for i in ids]
  large = positions.image_buckets(7, 9)
  np.testing.assert_array_equal(small, large[np.ix_(rows, rows)])


def test_sinusoids_distinguish_positions_and_neighbours_are_alike() -> None:
  assert positions.sinusoids(20, 33).shape == (20, 33)
  table = positions.sinusoids(20, 32)
  assert table.dtype == np.float32
  distance = np.linalg.norm(table[:, None] - table[None, :], axis=-1)
  assert (distance + np.eye(20) * 9 > 1.0).all()
  np.testing.assert_allclose(distance[0, 1], distance[10, 11], rtol=1e-4)
  assert distance[5, 6] < distance[5, 9] < distance[5, 19]


def test_image_sinusoids_contain_row_and_column() -> None:
  table = positions.image_sinusoids(6, 16)
  assert table.shape == (37, 16)
  np.testing.assert_array_equal(table[0], 0)
  grid = table[positions.image_position_ids(6, 6, 6)].reshape(6, 6, 16)
  np.testing.assert_array_equal(grid[2, 1, :8], grid[2, 4, :8])
  np.testing.assert_array_equal(grid[1, 3, 8:], grid[5, 3, 8:])
  assert len(np.unique(grid.reshape(36, 16).round(4), axis=0)) == 36
