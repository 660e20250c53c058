"""Files of torch.save: written, read, and rejected."""

import argparse
import collections
import os
import pathlib
import pickle
import types
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.interop.tensors import Tensor, check_bytes
from narvl_jax.interop.torch_file import Inert, read_torch
from narvl_jax.interop.torch_write import write_torch

SHARED = np.arange(6, dtype=np.float32).reshape(2, 3)
CONTENT = {
  "model": {
    "half": np.arange(4, dtype=np.float16),
    "brain": np.arange(4).astype(ml_dtypes.bfloat16),
    "a": SHARED,
    "b": SHARED,
    "scalar": np.array(7),
    "empty": np.zeros((0, 3), np.float32),
    "turned": np.arange(6, dtype=np.float64).reshape(2, 3).T,
  },
  "cfg": {
    "model": types.SimpleNamespace(arch="na_ofa_tiny", lr=[5e-5], size=(1, 2)),
    "none": None,
    "flags": [True, False, -1, 2**40, -(2**40), "ä"],
  },
}


def archive(path: pathlib.Path, pickled: bytes, **files: bytes) -> pathlib.Path:
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("x/data.pkl", pickled)
    for name, data in files.items():
      file.writestr(name.replace("__", "/"), data)
  return path


def test_there_and_back(tmp_path: pathlib.Path) -> None:
  write_torch(tmp_path / "x.pt", CONTENT)
  read = read_torch(tmp_path / "x.pt")
  assert read["cfg"] == CONTENT["cfg"] | {"model": read["cfg"]["model"]}
  assert vars(read["cfg"]["model"]) == vars(CONTENT["cfg"]["model"])
  for key, value in CONTENT["model"].items():
    tensor = read["model"][key]
    assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
    np.testing.assert_array_equal(np.asarray(tensor), value, strict=True)
  model = read["model"]
  assert model["a"].identity == model["b"].identity
  assert list(tmp_path.iterdir()) == [tmp_path / "x.pt"]


def test_written_arrays_are_aligned(tmp_path: pathlib.Path) -> None:
  write_torch(tmp_path / "x.pt", CONTENT)
  model = read_torch(tmp_path / "x.pt")["model"]
  assert {tensor.offset % 64 for tensor in model.values()} == {0}


def test_equal_content_makes_equal_files(tmp_path: pathlib.Path) -> None:
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    write_torch(tmp_path / name / "x.pt", CONTENT)
  a, b = ((tmp_path / name / "x.pt").read_bytes() for name in "ab")
  assert a == b


def test_nothing_is_left_of_a_failure(tmp_path: pathlib.Path) -> None:
  with pytest.raises(TypeError, match="set has no place in such a file"):
    write_torch(tmp_path / "x.pt", {"a": SHARED, "b": set()})
  assert not list(tmp_path.iterdir())


def test_torch_reads_what_is_written(tmp_path: pathlib.Path) -> None:
  torch = pytest.importorskip("torch")
  write_torch(tmp_path / "x.pt", CONTENT)
  with torch.serialization.safe_globals([argparse.Namespace]):
    read = torch.load(tmp_path / "x.pt", weights_only=True)
  assert vars(read["cfg"]["model"]) == vars(CONTENT["cfg"]["model"])
  assert read["cfg"]["flags"] == CONTENT["cfg"]["flags"]
  for key, value in CONTENT["model"].items():
    tensor = read["model"][key]
    assert tuple(tensor.shape) == value.shape
    wide = tensor.double().numpy()
    np.testing.assert_array_equal(wide, value.astype(np.float64))
  assert read["model"]["a"].data_ptr() == read["model"]["b"].data_ptr()


def test_files_of_torch_are_read(tmp_path: pathlib.Path) -> None:
  torch = pytest.importorskip("torch")
  base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
  made = {
    "whole": base,
    "turned": base.T,
    "part": base[1:3, 2:5],
    "steps": base[::2, ::3],
    "brain": base.to(torch.bfloat16),
    "parameter": torch.nn.Parameter(base),
    "ordered": collections.OrderedDict(x=1),
    "size": base.shape,
  }
  torch.save(made, tmp_path / "x.pt")
  read = read_torch(tmp_path / "x.pt")
  assert read["ordered"] == {"x": 1}
  assert isinstance(read["size"], Inert)
  for key in ("whole", "turned", "part", "steps", "brain", "parameter"):
    np.testing.assert_array_equal(
      np.asarray(read[key]).astype(np.float32),
      made[key].detach().float().numpy(),
      err_msg=key,
    )


class Hostile:
  """Creates a file when a pickle of it is loaded."""

  def __init__(self, call: Any, *arguments: Any) -> None:
    self.call, self.arguments = call, arguments

  def __reduce__(self) -> Any:
    return self.call, self.arguments


@pytest.mark.parametrize("name", ["os.system", "exec", "open", "getattr"])
def test_hostile_files_run_nothing(tmp_path: pathlib.Path, name: str) -> None:
  marker = tmp_path / "marker"
  hostile = {
    "os.system": Hostile(os.system, f"touch {marker}"),
    "exec": Hostile(exec, f"open({str(marker)!r}, 'w')"),
    "open": Hostile(open, str(marker), "w"),
    "getattr": Hostile(getattr, "", "format"),
  }[name]
  pickled = pickle.dumps({"model": {}, "extra": hostile}, protocol=2)
  path = archive(tmp_path / "x.pt", pickled)
  with pytest.raises(
    UserError, match=r"x.pt is rejected: its pickle wants to use .*; convert"
  ) as error:
    read_torch(path)
  assert "\n" not in str(error.value)
  assert not marker.exists()
  # The same file is harmful when it is unpickled.
  if name != "getattr":
    pickle.loads(pickled)
    assert marker.exists()


def test_a_tensor_cannot_be_turned_to_another_file(
  tmp_path: pathlib.Path,
) -> None:
  """Otherwise BUILD would set any attribute, such as the path."""
  write_torch(tmp_path / "good.pt", {"a": SHARED})
  with zipfile.ZipFile(tmp_path / "good.pt") as file:
    pickled, data = file.read("good/data.pkl"), file.read("good/data/0")
  assert pickled.endswith(b"Ru.")
  state = b"}(X\x04\x00\x00\x00pathX\x0b\x00\x00\x00/etc/passwdub"
  changed = pickled.removesuffix(b"u.") + state + b"u."
  path = archive(tmp_path / "x.pt", changed, x__data__0=data)
  with pytest.raises(UserError, match="is damaged: TypeError: a tensor has no"):
    read_torch(path)


def test_objects_that_are_not_needed_stay_unread(
  tmp_path: pathlib.Path,
) -> None:
  pickled = pickle.dumps({"best": np.float64(3.5), "a": 1}, protocol=2)
  read = read_torch(archive(tmp_path / "x.pt", pickled))
  assert isinstance(read["best"], Inert)
  assert read["a"] == 1


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({}, "the storage good/data/0 is missing"),
    ({"good__data__0": b"123"}, "the storage good/data/0 is cut short"),
    ({"good__byteorder": b"big"}, "was written on a big endian machine"),
  ],
)
def test_damaged_archives(
  tmp_path: pathlib.Path, files: dict[str, bytes], message: str
) -> None:
  write_torch(tmp_path / "good.pt", {"a": SHARED})
  with zipfile.ZipFile(tmp_path / "good.pt") as file:
    pickled = file.read("good/data.pkl")
  with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
    file.writestr("good/data.pkl", pickled)
    for name, data in files.items():
      file.writestr(name.replace("__", "/"), data)
  with pytest.raises(UserError, match=message):
    read_torch(tmp_path / "x.pt")


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("x/data.pkl", "not of torch.save: it contains 2 files data.pkl, not 1$"),
    ("x/data/0", "damaged: ValueError: the archive contains x/data/0 2 times$"),
  ],
)
def test_an_entry_appears_once(
  tmp_path: pathlib.Path, name: str, message: str
) -> None:
  """Otherwise the last one would be read, and other programs show the first."""
  write_torch(tmp_path / "x.pt", {"a": SHARED})
  with (
    zipfile.ZipFile(tmp_path / "x.pt", "a") as file,
    pytest.warns(UserWarning, match="Duplicate name"),
  ):
    file.writestr(name, file.read(name))
  with pytest.raises(UserError, match=message) as error:
    read_torch(tmp_path / "x.pt")
  assert "\n" not in str(error.value)


def test_tensors_stay_within_their_storage(tmp_path: pathlib.Path) -> None:
  write_torch(tmp_path / "good.pt", {"a": SHARED})
  with zipfile.ZipFile(tmp_path / "good.pt") as file:
    pickled, data = file.read("good/data.pkl"), file.read("good/data/0")
  # Claims rows of 300 numbers.
  wide = pickled.replace(b"J\x03\x00\x00\x00t", b"J\x2c\x01\x00\x00t", 1)
  assert wide != pickled
  path = archive(tmp_path / "x.pt", wide, x__data__0=data)
  with pytest.raises(UserError, match="a tensor reaches beyond its storage"):
    read_torch(path)


def test_files_that_are_no_archive(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.pt"
  with pytest.raises(UserError, match=r"x\.pt: there is no such file"):
    read_torch(path)
  path.write_bytes(pickle.dumps({"model": {}}))
  with pytest.raises(
    UserError, match=r"not a zip archive, .* torch < 1.6.*weights_only=True\)"
  ):
    read_torch(path)
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("readme", "")
  with pytest.raises(
    UserError, match=r"not of torch\.save: it contains 0 files"
  ):
    read_torch(path)
  with zipfile.ZipFile(path, "w") as file:
    for name in ("x/data.pkl", "y/data.pkl"):
      file.writestr(name, b"\x80\x02}.")
  with pytest.raises(
    UserError, match=r"not of torch\.save: it contains 2 files"
  ):
    read_torch(path)
  archive(path, b"\x80\x02nonsense")
  with pytest.raises(UserError, match=r"x\.pt is damaged: "):
    read_torch(path)


def test_files_without_check_sums(tmp_path: pathlib.Path) -> None:
  """torch can be configured to write 0 instead."""
  serialization = pytest.importorskip("torch.serialization")
  torch = pytest.importorskip("torch")
  before = serialization.get_crc32_options()
  serialization.set_crc32_options(False)
  try:
    torch.save({"a": torch.arange(6)}, tmp_path / "x.pt")
  finally:
    serialization.set_crc32_options(before)
  tensor = read_torch(tmp_path / "x.pt")["a"]
  check_bytes({"a": tensor})
  np.testing.assert_array_equal(np.asarray(tensor), np.arange(6))


def test_damaged_bytes(tmp_path: pathlib.Path) -> None:
  """One changed bit is found, in a tensor as in the pickle."""
  path = tmp_path / "x.pt"
  write_torch(path, CONTENT)
  whole = path.read_bytes()
  model = read_torch(path)["model"]
  check_bytes(model)

  def damage(offset: int) -> None:
    data = bytearray(whole)
    data[offset] ^= 1
    path.write_bytes(data)

  damage(model["brain"].offset + 3)
  model = read_torch(path)["model"]
  message = r"x\.pt is damaged: the bytes of brain do not .*download"
  with pytest.raises(UserError, match=message):
    check_bytes(model)
  check_bytes({key: model[key] for key in ("a", "b", "half", "turned")})
  damage(whole.index(b"na_ofa_tiny"))
  with pytest.raises(UserError, match=r"x\.pt is damaged: .*data.pkl.*downl"):
    read_torch(path)


def test_official_file(shared_files: pathlib.Path) -> None:
  path = shared_files / "fixtures" / "micro_nar.half.lean.pt"
  read = read_torch(path)
  assert read["cfg"]["model"].arch == "na_ofa_tiny"
  assert len(read["model"]) == 242
  assert all(isinstance(x, Tensor) for x in read["model"].values())
  torch = pytest.importorskip("torch")
  with torch.serialization.safe_globals([argparse.Namespace]):
    expected = torch.load(path, weights_only=True)["model"]
  for key, tensor in expected.items():
    np.testing.assert_array_equal(
      np.asarray(read["model"][key]), tensor.numpy(), strict=True
    )
