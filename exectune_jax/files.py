"""Files that are whole or not there, whenever a run is killed; of a disk, or
of a bucket (as epath.Path)."""

from __future__ import annotations

import os


def is_url(place) -> bool:
  """Whether it names a bucket, or file:///DIR that stands for one."""
  return '://' in str(place)


def write_whole(path, data: str | bytes) -> None:
  """Writes beside `path` and renames into place; an object of a bucket is
  whole or not there by itself."""
  data = data.encode() if isinstance(data, str) else data
  if is_url(path):
    path.write_bytes(data)
    return
  partial = path.with_name(f'{path.name}.partial')
  partial.write_bytes(data)
  os.replace(partial, path)


def listing(folder) -> list:
  """What is in a folder, sorted; an empty one of a bucket is not there."""
  try:
    return sorted(folder.iterdir())
  except (FileNotFoundError, NotADirectoryError):
    return []
