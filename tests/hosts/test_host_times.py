"""Times of an update, compared over the hosts."""

import pytest

from narvl_jax.hosts.host_times import HostTimes
from tests.hosts.test_notices import _hosts, _poll


def _record(times: HostTimes, updates: int, wait: float, step: float) -> None:
  """Records sums as a host with these seconds in an update."""
  kinds = {"data wait": updates * wait, "dispatch": updates * 0.01}
  times.record(updates, updates * (wait + step), kinds)


def test_the_slowest_host_is_named():
  _, notices, _ = _hosts(3)
  for own, wait in zip(notices, (0.01, 0.02, 0.5), strict=True):
    # In sum all take as long: the others wait for the slowest.
    _record(own.times, 10, wait, 1.0 - wait)
  _poll(notices)
  data, dispatch = notices[0].times.compare()
  assert str(data) == (
    "slowest host: host 2 (?), data wait 0.5 s an update, median 0.02 s"
  )
  assert data.noted
  assert data.metrics() == pytest.approx(
    {
      "hosts/data_wait_slowest": 0.5,
      "hosts/data_wait_median": 0.02,
      "hosts/data_wait_slowest_host": 2.0,
    }
  )
  assert (dispatch.kind, dispatch.noted) == ("dispatch", False)
  assert dispatch.slowest == dispatch.median == pytest.approx(0.01)


def test_only_what_delays_an_update_is_named():
  _, notices, _ = _hosts(3)
  for own, wait in zip(notices, (0.001, 0.001, 0.09), strict=True):
    _record(own.times, 10, wait, 1.0 - wait)
  _poll(notices)
  assert not any(found.noted for found in notices[0].times.compare())


def test_hosts_count_since_the_last_comparison():
  _, notices, _ = _hosts(2)
  times = notices[0].times
  for own in notices:
    _record(own.times, 10, 0.1, 1.0)
  assert times.compare() == []
  notices[0].poll()
  assert times.compare() == []
  _poll(notices)
  assert len(times.compare()) == 2
  # Nothing new.
  assert times.compare() == []
  # Hosts report different numbers of updates.
  notices[0].times.record(12, 14.0, {"data wait": 1.2, "dispatch": 0.1})
  notices[1].times.record(13, 15.0, {"data wait": 4.0, "dispatch": 0.1})
  _poll(notices)
  (data, _) = times.compare()
  assert (data.host, data.slowest) == (1, pytest.approx(1.0))
  assert data.median == pytest.approx((0.1 + 1.0) / 2)
