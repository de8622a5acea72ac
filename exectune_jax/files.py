"""Files that are whole or not there, whenever a run is killed."""

from __future__ import annotations

import os
import pathlib


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes `text` beside `path` and renames it into place."""
  partial = path.with_suffix('.partial')
  partial.write_text(text, 'utf-8')
  os.replace(partial, path)
