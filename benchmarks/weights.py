"""Random weights of a named size as a Hugging Face directory.

  python -m benchmarks.weights DIR SIZE
"""

import pathlib
import sys

import jax

from exectune_jax.models import hf, zoo
from exectune_jax.models.transformer import Transformer, init_variables


def main(folder: str, size: str) -> None:
  config = zoo.architecture(size)
  params = jax.jit(lambda key: init_variables(Transformer(config), key))(
      jax.random.key(0))['params']
  hf.write(pathlib.Path(folder), config, params, 'float32', {
      'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0})


if __name__ == '__main__':
  main(*sys.argv[1:])
