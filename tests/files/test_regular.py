"""Only regular files up to a limit are opened."""

import pytest

from narvl_jax.files.regular import UnusableFile, is_regular, read_regular
from tests.support import replacements


def test_files_and_links_to_them_are_read(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(b"text")
  (tmp_path / "link").symlink_to("file")
  assert read_regular(path) == read_regular(tmp_path / "link") == b"text"
  assert is_regular(tmp_path / "link")


@pytest.mark.parametrize("kind", replacements.NO_FILES)
def test_nothing_else_is_opened(tmp_path, kind):
  path = tmp_path / "file"
  replacements.replace(path, kind)
  assert not is_regular(path)
  with pytest.raises(OSError, match=r"file'$"):
    read_regular(path)


def test_the_size_is_limited(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(b"12345")
  with pytest.raises(UnusableFile, match="it has 5 bytes, the limit is 4"):
    read_regular(path, 4)
  replacements.replace(path, "huge")
  with pytest.raises(UnusableFile, match="1,099,511,627,776 bytes"):
    read_regular(path)
