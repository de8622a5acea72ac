"""The only place that builds meshes and partition specs.

Axes: data (rows), fsdp (rows, and parameters sliced), tensor (parameters
sliced inside a layer). One table says how each kind of parameter is cut.
"""

from __future__ import annotations

import dataclasses
import functools
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
  mesh = jax.make_mesh(sizes, AXES, devices=devices,
                       axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
  if devices is None:  # which hosts others would belong to is not known
    _check_owners(np.vectorize(lambda d: d.process_index)(mesh.devices))
  return mesh


def _check_owners(process: np.ndarray) -> None:
  """Each process fills rows of a batch with groups of its own, so no row may
  lie on two of them.

  process: index of each device's process, [data, fsdp, tensor].
  """
  if (process != process[..., :1]).any():
    held = process.size // len(np.unique(process))
    raise UserError(f'mesh.tensor={process.shape[2]}: does not fit into one '
                    f'process, of which each has {held} devices; choose a '
                    'divisor of that')


def put(tree, where: NamedSharding):
  """Arrays that every process holds whole, on the devices."""
  if where.is_fully_addressable:
    return jax.device_put(tree, where)
  return jax.tree.map(
      lambda x: build(np.shape(x), where, lambda i: np.asarray(x)[i]), tree)


def build(shape, where: NamedSharding, part):
  """An array whose slice at an index is `part(index)` on the host."""
  with jax.transfer_guard('allow'):  # explicit, although JAX can't tell
    return jax.make_array_from_callback(shape, where, part)


def put_local(tree, where: NamedSharding):
  """Rows of which each process holds its own."""
  if where.is_fully_addressable:
    return jax.device_put(tree, where)
  with jax.transfer_guard('allow'):
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(where, x), tree)


def fetch(array, layer: int) -> np.ndarray:
  """One layer of a stacked array, or (-1) all of it, whole on the host."""
  mesh = getattr(array.sharding, 'mesh', None)
  whole = mesh and replicated(mesh)
  if layer >= 0:
    where = jax.device_put(np.int32(layer)) if whole is None else put(
        np.int32(layer), whole)
    array = jax.jit(_layer, out_shardings=whole)(array, where)
  elif whole and not whole.is_fully_addressable:
    array = jax.jit(lambda x: x, out_shardings=whole)(array)
  return np.asarray(jax.device_get(array))


def _layer(array, index):
  return jax.lax.dynamic_index_in_dim(array, index, keepdims=False)


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


def over_rows(attend, mesh: Mesh | None):
  """`attend(q, k, v, segments, window)` on each device's rows and heads.

  For kernels that the compiler can't divide. q, k and v are [B, L, heads, Q],
  segments [B, L] or None, window a number or None.
  """
  if mesh is None or mesh.size == 1:
    return attend
  def spread(q, k, v, segments, window):
    count = row_multiple(mesh)
    row = ('data', 'fsdp') if q.shape[0] % count == 0 else None
    tensor = 'tensor' if k.shape[2] % mesh.shape['tensor'] == 0 else None
    heads = P(row, None, tensor, None)
    return jax.shard_map(
        attend, mesh=mesh, in_specs=(heads, heads, heads, P(row), P()),
        out_specs=heads, check_vma=False)(q, k, v, segments, window)
  return spread


def over_head(score, mesh: Mesh | None):
  """`score(hidden_BTD, target_BT, kernel_DV)` on each device's rows.

  The kernel comes together once before, its gradient is summed once after,
  in float32. The tensor axis is left to the compiler.
  """
  if mesh is None or row_multiple(mesh) == 1:
    return score
  def spread(hidden, target, kernel):
    if hidden.shape[0] % row_multiple(mesh):
      return score(hidden, target, kernel)
    row, cut = P(('data', 'fsdp')), _spec('head/kernel', kernel.shape, mesh)[0]
    def local(hidden, target, kernel):
      if cut:
        kernel = _together(kernel, hidden.dtype)
      return score(hidden, target, kernel)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(row, row, P(cut)), out_specs=row,
        axis_names={'data', 'fsdp'}, check_vma=False)(hidden, target, kernel)
  return spread


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _together(slices, dtype):
  """The slices of all fsdp devices, carried in `dtype`, as float32."""
  return jax.lax.all_gather(slices.astype(dtype), 'fsdp', tiled=True).astype(
      slices.dtype)


_together.defvjp(
    lambda slices, dtype: (_together(slices, dtype), None),
    lambda dtype, _, grad: (jax.lax.psum_scatter(grad, 'fsdp', tiled=True),))


def row_multiple(mesh: Mesh) -> int:
  """Batch rows must be a multiple of this."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def place(shapes, where):
  """Abstract arrays with shardings."""
  return jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(
      s.shape, s.dtype, sharding=w), shapes, where)


def shardings(tree, mesh: Mesh, whole: bool = False):
  """A sharding for every leaf of parameters or optimizer state.

  Args:
    tree: arrays or ShapeDtypeStructs; paths decide, and an axis that does
      not divide its dimension is dropped.
    whole: whether the slices over fsdp are together, as for sampling.
  """
  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = _spec(name, leaf.shape, mesh)
    return NamedSharding(mesh, P(*_without_fsdp(spec) if whole else spec))

  return jax.tree_util.tree_map_with_path(one, tree)


def _spec(name, shape, mesh) -> list:
  """The table's row for a parameter; leading axes are not cut."""
  if not shape:
    return []
  for pattern, spec in _TABLE:
    if re.search(pattern + '$', name):
      spec = (None,) * (len(shape) - len(spec)) + tuple(spec)
      return [a if a and n % mesh.shape[a] == 0 else None
              for a, n in zip(spec, shape, strict=True)]
  raise ValueError(f'no sharding rule for parameter {name!r}')


@dataclasses.dataclass(frozen=True)
class Placed:
  """Where a weight lives (sliced), and where it is for a product (whole)."""
  sliced: NamedSharding
  whole: NamedSharding


def placed(name: str, shape, mesh: Mesh | None) -> Placed | None:
  """Of a weight by name; None where there is nothing to say.

  Without this the compiler may leave weights in slices and move activations.
  """
  if mesh is None or mesh.size == 1:
    return None
  spec = _spec(name, shape, mesh)
  return Placed(NamedSharding(mesh, P(*spec)),
                NamedSharding(mesh, P(*_without_fsdp(spec))))


def _without_fsdp(spec):
  return [None if axis == 'fsdp' else axis for axis in spec]


def constrain(x, where: NamedSharding | None):
  return x if where is None else jax.lax.with_sharding_constraint(x, where)


def constrain_rows(x, mesh: Mesh | None):
  """Activations stay with their rows."""
  if mesh is None or mesh.size == 1 or x.shape[0] % row_multiple(mesh):
    return x
  return constrain(x, rows(mesh))
