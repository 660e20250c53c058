"""The odd host out is named, with what it has and what the others have."""

from narvl_jax.hosts.differences import describe_differences

_NAMES = ["a", "b", "c", "d"]
_ADVICE = "; start all hosts with the same code and flags"


def _facts(*changes: dict[str, str]) -> list[dict[str, str]]:
  usual = {"config seed": "0", "config model.width": "8", "version jax": "1"}
  return [{**usual, **own} for own in changes]


def test_equal_hosts():
  assert describe_differences(_facts({}, {}, {}), _NAMES) is None
  assert describe_differences(_facts({}), _NAMES) is None


def test_one_host_differs_in_two_settings():
  odd = {"config seed": "1", "config model.width": "9"}
  assert describe_differences(_facts({}, odd, {}), _NAMES) == (
    "host 1 (b): config differs: seed 1, the others 0; model.width 9, the"
    " others 8" + _ADVICE
  )


def test_the_first_host_may_be_the_odd_one():
  text = describe_differences(_facts({"version jax": "0"}, {}, {}), _NAMES)
  assert text == "host 0 (a): version differs: jax 0, the others 1" + _ADVICE


def test_of_two_hosts_the_second_one_differs():
  text = describe_differences(_facts({"config seed": "1"}, {}), _NAMES)
  assert text == "host 1 (b): config differs: seed 0, host 0 1" + _ADVICE


def test_several_hosts_and_an_absent_setting():
  facts = _facts({}, {"version jax": "2"}, {}, {"config new": "x"})
  assert describe_differences(facts, _NAMES) == (
    "host 1 (b): version differs: jax 2, the others 1 | host 3 (d): config"
    " differs: new x, the others absent" + _ADVICE
  )


def test_long_lists_are_cut():
  odd = {f"config key{i}": "x" for i in range(11)}
  text = describe_differences(_facts({}, {}, odd), _NAMES)
  assert text is not None
  assert text.count("key") == 8
  assert "; and 3 more" in text
