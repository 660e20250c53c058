"""The programs of a run as text."""

from types import SimpleNamespace
from typing import Any

import pytest

from narvl_jax.errors import UserError
from narvl_jax.experiment.create import create
from narvl_jax.parallel import make_mesh
from narvl_jax.run import dump, training_run
from narvl_jax.training.setup import build_setup
from tests.support.tiny import tiny_config


def test_programs_are_written_with_their_sizes(tmp_path):
  setup = build_setup(create(tiny_config(), shapes_only=True), make_mesh(1))
  update: Any = SimpleNamespace(as_text=lambda: "HloModule jit_train_step\n")
  lines: list[str] = []
  dump.dump_programs(setup, update, str(tmp_path / "new" / "hlo"), lines.append)
  files = {path.name: path for path in (tmp_path / "new/hlo").iterdir()}
  assert set(files) == {
    f"{name}.{kind}.txt"
    for name in ("train_step", "predict_step")
    for kind in ("stablehlo", "optimised")
  }
  assert "stablehlo" in files["train_step.stablehlo.txt"].read_text()
  optimised = files["train_step.optimised.txt"]
  assert optimised.read_text() == "HloModule jit_train_step\n"
  text = files["predict_step.optimised.txt"].read_text()
  assert text.startswith("HloModule jit_predict")
  assert f"wrote {optimised}, 25.0 B" in lines


@pytest.mark.parametrize("key", ["debug.dump_hlo", "profile.dir"])
def test_a_folder_that_cannot_be_written_is_found_first(tmp_path, key):
  (tmp_path / "file").write_text("")
  config = tiny_config()
  config.update_from_flattened_dict({key: str(tmp_path / "file" / "x")})
  with pytest.raises(UserError, match=f"--config.{key}=.*a file, not a"):
    training_run.train(config, tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()
