"""TensorFlow Datasets without TensorFlow: build once, read through grain."""

from __future__ import annotations

import hashlib
import os
import pathlib

from exectune_jax.errors import UserError


def cache_root() -> pathlib.Path:
  """Where prepared data sets live: $TFDS_DATA_DIR or the user's cache."""
  default = '~/.cache/exectune_jax/tfds'
  return pathlib.Path(os.environ.get('TFDS_DATA_DIR', default)).expanduser()


def read(builder_class, source: str, files: tuple[str, ...], split: str):
  """Rows of a split as dicts of str and float.

  Args:
    builder_class: a GeneratorBasedBuilder taking `source`.
    source: directory with the upstream files; '' downloads them.
    files: what must be in that directory.
    split: TFDS split expression, such as 'train[:100]'.
  """
  import grain.python as grain
  import tensorflow_datasets as tfds
  tfds.disable_progress_bar()
  version = 'upstream'
  if source:
    digest = hashlib.sha256()
    for name in files:
      path = pathlib.Path(source) / name
      if not path.is_file():
        raise UserError(f"task.data_dir='{source}': there is no {name}; put "
                        "the upstream file there, or set task.data_dir='' to "
                        'download it')
      digest.update(path.read_bytes())
    version = digest.hexdigest()[:16]  # changed files are built anew
  builder = builder_class(source=source, data_dir=cache_root() / version,
                          file_format='array_record')
  try:
    builder.download_and_prepare()
  except OSError as e:
    raise UserError(f"task.data_dir='{source}': {e}; without a network, "
                    f'name a directory that holds {", ".join(files)}') from e
  data = grain.MapDataset.source(builder.as_data_source(split=split))
  for row in data:
    yield {k: v.decode() if isinstance(v, bytes) else v
           for k, v in row.items()}
