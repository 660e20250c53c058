"""Official weights are read from and written to stores."""

import pathlib
from typing import Any

import numpy as np
import pytest

from narvl_jax.checkpointing.runs import load_run
from narvl_jax.errors import UserError
from narvl_jax.files.stores import as_path
from narvl_jax.interop import transfer
from narvl_jax.interop.run_folder import VocabularyFiles
from narvl_jax.interop.source_file import open_source
from narvl_jax.interop.torch_write import write_torch
from tests.interop.states import COUNTS, fitting_config, narvl_state
from tests.stores.servers import Store


@pytest.fixture
def bucket(
  gcs: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return as_path(gcs.make_bucket())


def test_there_and_back(
  bucket: Any, official: pathlib.Path, words: pathlib.Path
) -> None:
  (bucket / "x.pt").put(official)
  (bucket / "words").put(words)
  report = transfer.import_official(
    f"{bucket}/x.pt",
    f"{bucket}/run",
    vocabulary=VocabularyFiles(f"{bucket}/words", **COUNTS),
    config=fitting_config(),
  )
  assert report["source"]["file"] == f"{bucket}/x.pt"
  experiment, _, step = load_run(f"{bucket}/run")
  assert (experiment.vocabulary.size, step) == (50, 0)
  transfer.export_official(f"{bucket}/run", f"{bucket}/y.pt")
  state = open_source(f"{bucket}/y.pt").state
  for key, value in narvl_state(np.float16).items():
    if value.dtype == np.float16:
      np.testing.assert_array_equal(np.asarray(state[key]), value)
  with pytest.raises(UserError, match=r"y\.pt exists; name a new file"):
    transfer.export_official(f"{bucket}/run", f"{bucket}/y.pt")
  with pytest.raises(UserError, match="run is not empty"):
    transfer.import_official(f"{bucket}/x.pt", f"{bucket}/run")


def test_mistakes_name_the_file_in_the_store(
  bucket: Any, tmp_path: pathlib.Path
) -> None:
  with pytest.raises(UserError, match=r"--from=gs://.*x.pt: there is no such"):
    open_source(f"{bucket}/x.pt")
  content: Any = [1]
  write_torch(tmp_path / "x.pt", content)
  (bucket / "x.pt").put(tmp_path / "x.pt")
  with pytest.raises(UserError, match=r"--from=gs://.*x.pt contains a list"):
    open_source(f"{bucket}/x.pt")
