"""TensorFlow Datasets without TensorFlow: build once, read through grain."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from exectune_jax.errors import UserError


class UpstreamBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set of texts, made of the files that upstream ships.

  A subclass names its FILES, where each comes from, its text FIELDS, and
  `rows`, which reads one file.

  Args:
    source: directory with the files; '' downloads them.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES: ClassVar = {'1.0.0': 'First.'}
  FILES: ClassVar[dict[str, str]] = {}  # TFDS split: file name
  URLS: ClassVar[dict[str, str]] = {}  # TFDS split: where to download it
  FIELDS: ClassVar[tuple[str, ...]] = ()

  def __init__(self, *, source: str = '', **kwargs):
    self._source = source
    super().__init__(**kwargs)

  def rows(self, path: pathlib.Path) -> Iterator[dict[str, str]]:
    """Rows of a file: dicts with FIELDS. Raises UserError for bad ones."""
    raise NotImplementedError

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, description='In upstream order.',
        disable_shuffling=True, features=tfds.features.FeaturesDict(
            {f: tfds.features.Text() for f in self.FIELDS}))

  def _split_generators(self, dl_manager):
    if self._source:
      paths = {s: pathlib.Path(self._source) / f
               for s, f in self.FILES.items()}
    else:
      paths = dl_manager.download(self.URLS)
    return {s: self._generate_examples(pathlib.Path(p))
            for s, p in paths.items()}

  def _generate_examples(self, path):
    for i, row in enumerate(self.rows(path)):
      yield i, {f: row[f] for f in self.FIELDS}


def cache_root() -> pathlib.Path:
  """Where prepared data sets live: $TFDS_DATA_DIR or the user's cache."""
  default = '~/.cache/exectune_jax/tfds'
  return pathlib.Path(os.environ.get('TFDS_DATA_DIR', default)).expanduser()


def read(builder_class: type[UpstreamBuilder], source: str, split: str):
  """Rows of a split as dicts of str.

  Args:
    builder_class: which data set.
    source: directory with the upstream files; '' downloads them.
    split: TFDS split expression, such as 'train[:100]'.
  """
  import grain.python as grain
  tfds.disable_progress_bar()
  files = builder_class.FILES.values()
  # Changed files, and rows that are read another way, are built anew.
  digest = hashlib.sha256(repr(builder_class.FIELDS).encode())
  if source:
    for name in files:
      path = pathlib.Path(source) / name
      if not path.is_file():
        raise UserError(f"task.data_dir='{source}': there is no {name}; put "
                        "the upstream file there, or set task.data_dir='' to "
                        'download it')
      digest.update(path.read_bytes())
  elif not builder_class.URLS:
    raise UserError(f"task.data_dir='': name a directory that holds "
                    f'{", ".join(files)}; it cannot be downloaded')
  builder = builder_class(
      source=source, file_format='array_record',
      data_dir=cache_root() / digest.hexdigest()[:16])
  try:
    builder.download_and_prepare()
  except OSError as e:
    raise UserError(f"task.data_dir='{source}': {e}; without a network, "
                    f'name a directory that holds {", ".join(files)}') from e
  data = grain.MapDataset.source(builder.as_data_source(split=split))
  for row in data:
    yield {k: v.decode() if isinstance(v, bytes) else v
           for k, v in row.items()}
