"""Rules, schedules and the optimizer against formulas written out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from narvl_jax.errors import UserError
from narvl_jax.state.parameters import (
  ParameterRule,
  assign_rules,
  flatten,
  merge,
  parse_rules,
  queries_only,
  split_frozen,
)
from narvl_jax.training.optimizer import (
  ema_decay_at,
  make_optimizer,
  make_schedule,
)

PATHS = ["encoder/kernel", "encoder/bias", "decoder/kernel", "decoder/bias"]
DEFAULTS: dict[str, Any] = {
  "weight_decay": 0.1,
  "b1": 0.9,
  "b2": 0.99,
  "eps": 1e-8,
  "clip_norm": 0.0,
}


class TestRules:
  def test_first_match_of_the_full_path_counts(self):
    rules = [
      ("encoder/.*", {"freeze": True}),
      (".*bias", {"decay": 0.0}),
      (".*", {"lr": 0.5}),
    ]
    assert assign_rules(rules, PATHS) == {
      "encoder/kernel": ParameterRule(freeze=True),
      "encoder/bias": ParameterRule(freeze=True),
      "decoder/bias": ParameterRule(decay=0.0),
      "decoder/kernel": ParameterRule(lr=0.5),
    }

  def test_part_of_a_path_does_not_match(self):
    for part in ("bias", "encoder"):
      with pytest.raises(
        UserError, match=f'"{part}" is never used: it matches no'
      ):
        assign_rules([(part, {}), (".*", {})], PATHS)

  def test_every_parameter_needs_a_rule(self):
    with pytest.raises(
      UserError,
      match=r'no rule for parameter "decoder/kernel"; end the list .*"\.\*"',
    ):
      assign_rules([("encoder/.*", {}), (".*bias", {})], PATHS)

  def test_rule_without_parameters(self):
    with pytest.raises(
      UserError,
      match=r'"encoder/kernle" is never used: .*Did you mean "encoder/kernel"',
    ):
      assign_rules([("encoder/kernle", {}), (".*", {})], PATHS)

  def test_rule_whose_parameters_have_earlier_rules(self):
    with pytest.raises(
      UserError, match=r'"encoder/bias" is never used: earlier rules match all'
    ):
      assign_rules(
        [(".*bias", {}), ("encoder/bias", {"lr": 0.1}), (".*", {})], PATHS
      )

  @pytest.mark.parametrize(
    ("entry", "message"),
    [
      (".*", r"'\.\*' is not a pair \(regex, settings\) such as"),
      ((".*", {}, 1), r"is not a pair"),
      ((3, {}), r"\(3, \{\}\) is not a pair"),
      ((".*", 0.1), r"is not a pair"),
      (("(", {}), r'regex "\(" does not compile: '),
      ((".*", {"rate": 0.1}), r'".*" sets "rate"\. Valid: decay, freeze, lr'),
      ((".*", {"decya": 0.1}), r'sets "decya"\. Did you mean "decay"'),
      ((".*", {"lr": "1"}), r"sets lr='1', not a number >= 0"),
      ((".*", {"lr": -1}), r"sets lr=-1, not a number >= 0"),
      ((".*", {"lr": float("nan")}), r"sets lr=nan, not a number >= 0"),
      ((".*", {"freeze": 1}), r"sets freeze=1, not True or False"),
    ],
  )
  def test_mistakes(self, entry, message):
    with pytest.raises(UserError, match=r"optimizer\.rules: .*" + message):
      parse_rules([entry])

  def test_lists_as_json_has_them(self):
    assert parse_rules([[".*", {"lr": 2}]]) == [(".*", ParameterRule(lr=2))]

  def test_split_and_merge(self):
    params = {"encoder": {"kernel": 1, "bias": 2}, "decoder": {"bias": 3}}
    rules = {path: ParameterRule(freeze="enc" in path) for path in PATHS}
    trained, frozen = split_frozen(params, rules)
    assert flatten(trained) == {"decoder/bias": 3}
    assert flatten(frozen) == {"encoder/kernel": 1, "encoder/bias": 2}
    assert merge(trained, frozen) == params


def _values(name: str, warmup: int, steps: int) -> list[float]:
  schedule: Any = make_schedule(
    learning_rate=2.0, schedule=name, warmup_steps=warmup, steps=steps
  )
  return [float(schedule(jnp.int32(step))) for step in range(steps + 1)]


class TestSchedules:
  @pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
  def test_warmup_is_linear_from_zero(self, name):
    assert _values(name, 4, 10)[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]

  def test_after_the_warmup(self):
    np.testing.assert_allclose(
      _values("linear", 2, 6), [0, 1, 2, 1.5, 1, 0.5, 0], rtol=1e-6
    )
    half = np.sqrt(0.5)
    np.testing.assert_allclose(
      _values("cosine", 2, 6),
      [0, 1, 2, 1 + half, 1, 1 - half, 0],
      rtol=1e-5,
      atol=1e-6,
    )
    assert _values("constant", 2, 6) == [0, 1, 2, 2, 2, 2, 2]

  @pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
  def test_without_warmup_the_first_update_has_the_peak(self, name):
    assert _values(name, 0, 5)[0] == 2.0

  @pytest.mark.parametrize(("warmup", "total"), [(0, 9), (3, 17), (100, 101)])
  def test_linear_is_the_polynomial_decay_of_the_reference(self, warmup, total):
    # fairseq's polynomial_decay with power 1 and end rate 0, n updates done.
    def reference(n: int) -> float:
      if warmup and n <= warmup:
        return 2.0 * n / warmup
      if n >= total:
        return 0.0
      return 2.0 * (1 - (n - warmup) / (total - warmup))

    np.testing.assert_allclose(
      _values("linear", warmup, total),
      [reference(n) for n in range(total + 1)],
      rtol=1e-5,
      atol=1e-6,
    )

  def test_unknown_schedule(self):
    with pytest.raises(
      UserError,
      match=r'optimizer.schedule: "cosin" .*"cosine".*--config.optimizer.sched',
    ):
      _values("cosin", 0, 5)

  @pytest.mark.parametrize("warmup", [-1, 50, 51])
  def test_warmup_that_does_not_fit(self, warmup):
    with pytest.raises(
      UserError,
      match=rf"warmup_steps={warmup} must .* below train.steps=50: .*steps=5$",
    ):
      _values("linear", warmup, 50)


def _params() -> dict:
  rng = np.random.default_rng(0)
  return {
    "encoder": {
      "kernel": rng.normal(size=(3, 4)).astype(np.float32),
      "bias": rng.normal(size=4).astype(np.float32),
    }
  }


def _gradients(count: int) -> list[dict]:
  rng = np.random.default_rng(1)
  return [
    jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32), _params()
    )
    for _ in range(count)
  ]


def _train(rules: dict, gradients: list, **settings) -> dict:
  schedule = optax.linear_schedule(0.1, 0.2, 3)
  optimizer = make_optimizer(
    settings.pop("schedule", schedule), rules, **{**DEFAULTS, **settings}
  )
  params: Any = _params()
  state = optimizer.init(params)
  for gradient in gradients:
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return flatten(params)


def _adamw(path: str, gradients: list, lr: float, decay: float) -> np.ndarray:
  """Adam of Kingma and Ba with the decay of Loshchilov and Hutter."""
  x = flatten(_params())[path].astype(np.float64)
  m, v = np.zeros_like(x), np.zeros_like(x)
  b1, b2 = DEFAULTS["b1"], DEFAULTS["b2"]
  for t, gradient in enumerate(gradients, 1):
    g = flatten(gradient)[path].astype(np.float64)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    direction = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + DEFAULTS["eps"])
    rate = lr * (0.1 + 0.1 * min(t - 1, 3) / 3)
    x = x - rate * (direction + decay * x)
  return x


class TestUpdates:
  def test_factors_on_rate_and_decay(self):
    gradients = _gradients(5)
    rules = {
      "encoder/kernel": ParameterRule(lr=0.5, decay=2.0),
      "encoder/bias": ParameterRule(decay=0.0),
    }
    trained = _train(rules, gradients)
    for path, lr, decay in (
      ("encoder/kernel", 0.5, 0.2),
      ("encoder/bias", 1.0, 0.0),
    ):
      expected = _adamw(path, gradients, lr, decay)
      np.testing.assert_allclose(trained[path], expected, rtol=1e-5, atol=1e-6)

  def test_rate_of_zero_changes_nothing(self):
    rules = {
      "encoder/kernel": ParameterRule(lr=0.0),
      "encoder/bias": ParameterRule(),
    }
    trained = _train(rules, _gradients(2))
    before = flatten(_params())
    np.testing.assert_array_equal(
      trained["encoder/kernel"], before["encoder/kernel"]
    )
    assert np.all(trained["encoder/bias"] != before["encoder/bias"])

  def test_clipping_is_by_the_norm_of_all_gradients(self):
    rules = {path: ParameterRule() for path in flatten(_params())}
    # After one update the first moment is (1 - b1) x the clipped gradient.
    for scale, clip, factor in ((1.0, 0.5, None), (1e-3, 0.5, 1), (9.0, 0, 1)):
      gradient = jax.tree.map(lambda x, s=scale: s * x, _gradients(1)[0])
      norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient)))
      optimizer = make_optimizer(
        optax.constant_schedule(1.0), rules, **{**DEFAULTS, "clip_norm": clip}
      )
      state: Any
      _, state = optimizer.update(
        gradient, optimizer.init(_params()), _params()
      )
      adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
      expected = factor or clip / norm
      jax.tree.map(
        lambda m, g, e=expected: np.testing.assert_allclose(
          m, 0.1 * e * g, rtol=1e-5
        ),
        adam.mu,
        gradient,
      )


class TestEpsilon:
  @pytest.mark.parametrize("placement", ["standard", "official"])
  def test_placement(self, placement):
    params = {"kernel": jnp.full((2, 2), 0.5)}
    settings: Any = {**DEFAULTS, "eps": 0.1, "weight_decay": 0.0}
    optimizer = make_optimizer(
      lambda _: 1.0,
      assign_rules([(".*", {})], list(params)),
      **settings,
      eps_placement=placement,
    )
    state, mu, nu = optimizer.init(params), 0.0, 0.0
    for t, gradient in enumerate((0.2, -0.3, 0.1), 1):
      grads = {"kernel": jnp.full((2, 2), gradient)}
      updates: Any
      updates, state = optimizer.update(grads, state, params)
      mu, nu = 0.9 * mu + 0.1 * gradient, 0.99 * nu + 0.01 * gradient**2
      root = np.sqrt(1 - 0.99**t)
      if placement == "standard":
        wanted = mu / (1 - 0.9**t) / (np.sqrt(nu) / root + 0.1)
      else:
        wanted = mu / (1 - 0.9**t) * root / (np.sqrt(nu) + 0.1)
      np.testing.assert_allclose(updates["kernel"], -wanted, rtol=1e-5)

  def test_state_does_not_depend_on_the_placement(self):
    rules = assign_rules([(".*", {})], ["kernel"])
    a, b = (
      make_optimizer(lambda _: 1.0, rules, **DEFAULTS, eps_placement=name)
      for name in ("standard", "official")
    )
    params = {"kernel": jnp.ones(3)}
    assert jax.tree.structure(a.init(params)) == jax.tree.structure(
      b.init(params)
    )


class TestMovingAverage:
  def test_decay_is_constant_without_warmup(self):
    assert float(ema_decay_at(jnp.int32(0), 0.99, False)) == pytest.approx(0.99)

  @pytest.mark.parametrize(
    ("step", "decay"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (1000, 0.95)]
  )
  def test_warmup_rises_to_the_decay(self, step, decay):
    value = float(ema_decay_at(jnp.int32(step), 0.95, True))
    assert value == pytest.approx(decay)


class TestRows:
  RULES = (("table", {"rows": (2, 4)}), (".*", {}))

  def test_only_some_rows_change(self):
    params = {"table": jnp.ones((5, 3)), "kernel": jnp.ones((3, 3))}
    gradient = jax.tree.map(lambda x: jnp.full_like(x, 2.0), params)
    rules = assign_rules(self.RULES, list(params))
    optimizer = make_optimizer(lambda _: 0.1, rules, **DEFAULTS)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    changed: Any = jax.tree.map(lambda x: np.asarray(x != 0), updates)
    assert changed["table"].all(1).tolist() == [False, False, True, True, False]
    assert changed["kernel"].all()

  def test_other_rows_have_no_part_in_the_norm(self):
    params = {"table": jnp.ones((5, 3))}
    gradient = {"table": jnp.full((5, 3), 100.0).at[2:4].set(0.1)}
    rules = assign_rules(self.RULES[:1], ["table"])
    settings: Any = {**DEFAULTS, "eps": 1.0}
    free = make_optimizer(lambda _: 0.1, rules, **settings)
    settings["clip_norm"] = 1.0
    clipped = make_optimizer(lambda _: 0.1, rules, **settings)
    a: Any = clipped.update(gradient, clipped.init(params), params)[0]
    b: Any = free.update(gradient, free.init(params), params)[0]
    np.testing.assert_allclose(a["table"], b["table"])

  @pytest.mark.parametrize("rows", [3, (1,), (4, 2), (-1, 2), ("a", "b")])
  def test_fields_without_rows(self, rows):
    with pytest.raises(UserError, match=r'"table" sets rows=.*, not \(first'):
      parse_rules([("table", {"rows": rows})])

  def test_queries_only(self):
    paths = ["embed_tokens", "decoder/query_embed", "decoder/pos_ln/bias"]
    assert assign_rules(queries_only(9), paths) == {
      "embed_tokens": ParameterRule(rows=(9, 10)),
      "decoder/query_embed": ParameterRule(),
      "decoder/pos_ln/bias": ParameterRule(freeze=True),
    }
