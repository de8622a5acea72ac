"""The only place that builds meshes and partition specs.

Axes: data (rows), fsdp (rows, and parameters sliced), tensor (parameters
sliced inside a layer). One table says how each kind of parameter is cut.
"""

from __future__ import annotations

import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from exectune_jax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')

# path pattern -> spec of the last axes; stacked layers add a leading None
_TABLE = (
    (r'embed/embedding', P('tensor', 'fsdp')),
    (r'head/kernel', P('fsdp', 'tensor')),
    (r'(q|k|v|gate|up)/kernel', P('fsdp', 'tensor')),
    (r'(o|down)/kernel', P('tensor', 'fsdp')),
    (r'(q|k|v)/bias', P('tensor')),
    (r'scale', P()),
    (r'(q|k|v|gate|up)/a', P('fsdp', None)),  # adapters
    (r'(q|k|v|gate|up)/b', P(None, 'tensor')),
    (r'(o|down)/a', P('tensor', None)),
    (r'(o|down)/b', P(None, 'fsdp')),
)


def make_mesh(section, devices=None) -> Mesh:
  """The mesh of `config.mesh`; one axis may be -1 (what is left).

  devices: all that JAX sees, or others to compile for.
  """
  sizes = [section.data, section.fsdp, section.tensor]
  count = len(devices) if devices else jax.device_count()
  known = int(np.prod([s for s in sizes if s > 0]))
  if sizes.count(-1) == 1 and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if min(sizes) < 1 or int(np.prod(sizes)) != count:
    raise UserError(f'mesh=({section.data}, {section.fsdp}, {section.tensor}):'
                    f' must multiply to the {count} devices here; one axis '
                    'may be -1')
  if section.mode == 'pmap' and sizes[1] * sizes[2] > 1:
    raise UserError(f"mesh.mode='pmap': every device holds the whole guide; "
                    f'mesh.fsdp={sizes[1]} and mesh.tensor={sizes[2]} must '
                    "be 1, or use mesh.mode='pjit'")
  return jax.make_mesh(sizes, AXES, devices=devices,
                       axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def rows(mesh: Mesh) -> NamedSharding:
  """Batches: rows over data and fsdp."""
  return NamedSharding(mesh, P(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def sampling(state, mesh: Mesh):
  """Where the sampler's state lives: prompts over rows, heads over tensor.

  Caches are [N, B, ..., K, Q]; everything else starts with B.
  """
  def one(leaf):
    if leaf.ndim < 5:
      return rows(mesh) if leaf.ndim else replicated(mesh)
    heads = 'tensor' if leaf.shape[-2] % mesh.shape['tensor'] == 0 else None
    middle = (None,) * (leaf.ndim - 4)
    return NamedSharding(mesh, P(None, ('data', 'fsdp'), *middle, heads, None))
  return jax.tree.map(one, state)


def constrain_sampling(state, mesh: Mesh):
  return jax.lax.with_sharding_constraint(state, sampling(state, mesh))


def row_multiple(mesh: Mesh) -> int:
  """Batch rows must be a multiple of this."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def shardings(tree, mesh: Mesh):
  """A sharding for every leaf of parameters or optimizer state.

  Args:
    tree: arrays or ShapeDtypeStructs; paths decide, and an axis that does
      not divide its dimension is dropped.
  """
  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if leaf.ndim == 0:
      return replicated(mesh)
    for pattern, spec in _TABLE:
      if re.search(pattern + '$', name):
        spec = (None,) * (leaf.ndim - len(spec)) + tuple(spec)
        spec = [a if a and n % mesh.shape[a] == 0 else None
                for a, n in zip(spec, leaf.shape, strict=True)]
        return NamedSharding(mesh, P(*spec))
    raise ValueError(f'no sharding rule for parameter {name!r}')

  return jax.tree_util.tree_map_with_path(one, tree)
