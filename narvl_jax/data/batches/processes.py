"""Functions that all worker processes use."""

import os
import threading
import time

_CHECK_SECONDS = 0.5


def exit_with_parent(parent: int) -> None:
  """Starts a thread that ends this process when process `parent` has ended.

  A main process that is killed cannot stop its workers itself.
  """
  threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(_CHECK_SECONDS)
  os._exit(1)
