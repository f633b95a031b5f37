"""Split of the output vocabulary over devices, with the collectives that it needs.

Columns of the output projection [D, V] (D: hidden size, V: vocabulary size) are split over the mesh
axis `tensor`, and again over groups of neighbours along `fsdp`. Devices in a group all-gather their
hidden states, and each computes the logits of its columns for every token of the group. A device
then holds only its columns of the kernel and of the kernel's gradient; and it moves fewer bytes
than an all-gather of the kernel would, because hidden states are smaller wherever the vocabulary is
much larger than the number of tokens per device. The methods run inside `shard_map`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.parallel import current_mesh, mesh_axis, on_mesh

_FSDP, _TENSOR = mesh_axis("embed"), mesh_axis("vocab")

# Width of a TPU register. Parts that end elsewhere make the TPU compiler replace a reduce-scatter
# by an all-reduce, which moves twice the bytes.
_LANES = 128


def best_parts(tokens: int, columns: int, fsdp: int) -> int:
    """Returns the group size along `fsdp` that moves the fewest bytes.

    With groups of g a device receives 2·D·columns/g bytes of a bf16 kernel (D: hidden size), sends
    4·D·columns/g of its float32 gradient, and exchanges (2 + 4)·D·g·tokens for hidden states and
    their gradient. The sum is least at g² = columns/tokens, and flat around it; rounding up halves
    what a device holds.

    Args:
      tokens: number of tokens per device.
      columns: number of vocabulary columns per `tensor` shard.
      fsdp: size of the mesh axis.

    Returns:
      The power of two at or above the optimum, at most the largest that divides `fsdp`.
    """
    best = 2 ** max(0, math.ceil(math.log2(columns / tokens) / 2))
    return min(best, fsdp & -fsdp)


@dataclasses.dataclass(frozen=True)
class VocabSplit:
    """Columns of the output projection [D, V] that each device holds while a loss is computed.

    Shapes: D hidden size, V vocabulary size, C tokens of a chunk on one device.

    Attributes:
      columns: number of columns of one `tensor` shard, V/tensor.
      parts: size of the groups of neighbours along `fsdp` that split those columns, `width` each.
      fsdp: size of the mesh axis `fsdp`; 1 without a mesh.
      tensor: size of the mesh axis `tensor`; 1 without a mesh.
    """

    columns: int
    parts: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def width(self) -> int:
        """Number of columns per device, rounded up to whole TPU lanes where that adds little."""
        width = -(-self.columns // self.parts)
        cheap = self.parts > 1 and width >= 8 * _LANES
        return -(-width // _LANES) * _LANES if cheap else width

    @property
    def padding(self) -> int:
        """Number of padding columns of a group, at the end of its last part."""
        return self.parts * self.width - self.columns

    def _group(self) -> list[list[int]]:
        """Returns the groups of devices that split the vocabulary among them.

        Returns:
          Indices along `fsdp`, as the argument `axis_index_groups` of JAX's collectives expects
          them.
        """
        starts = range(0, self.fsdp, self.parts)
        return [[q + r for r in range(self.parts)] for q in starts]

    def _peers(self) -> list[list[int]] | None:
        """Returns the groups of devices that hold the same columns, one device of each vocabulary
        group.

        Returns:
          Indices along `fsdp`, as `axis_index_groups`; None (all devices along `fsdp`) if the
          vocabulary is not split along it.
        """
        if self.parts == 1:
            return None
        starts = range(0, self.fsdp, self.parts)
        return [[q + r for q in starts] for r in range(self.parts)]

    def collect_kernel(self, kernel: jax.Array) -> jax.Array:
        """Gathers this device's columns [D, width] from the stored shards [D/fsdp, columns]."""
        if self.parts > 1:
            kernel = jnp.pad(kernel, ((0, 0), (0, self.padding)))
            kernel = jax.lax.all_to_all(
                kernel, _FSDP, 1, 0, tiled=True, axis_index_groups=self._group()
            )
        if self.fsdp > self.parts:
            kernel = jax.lax.all_gather(
                kernel, _FSDP, axis=0, tiled=True, axis_index_groups=self._peers()
            )
        return kernel

    def scatter_kernel(self, gradient: jax.Array) -> jax.Array:
        """Sums gradients [D, width] over devices and returns this one's shard [D/fsdp, columns].

        The transpose of `collect_kernel`.
        """
        if self.fsdp > self.parts:
            gradient = jax.lax.psum_scatter(
                gradient, _FSDP, scatter_dimension=0, tiled=True, axis_index_groups=self._peers()
            )
        if self.parts > 1:
            gradient = jax.lax.all_to_all(
                gradient, _FSDP, 0, 1, tiled=True, axis_index_groups=self._group()
            )
            gradient = gradient[:, : self.columns]
        return gradient

    def collect_tokens(self, x: jax.Array, axis: int) -> jax.Array:
        """All-gathers an array over the group: size C along `axis` becomes parts·C."""
        if self.parts == 1:
            return x
        return jax.lax.all_gather(x, _FSDP, axis=axis, tiled=True, axis_index_groups=self._group())

    def scatter_tokens(self, x: jax.Array) -> jax.Array:
        """Sums [parts·C, …] over the devices that split the columns; returns this one's [C, …].

        The transpose of `collect_tokens` along axis 0.
        """
        if self.parts > 1:
            x = jax.lax.psum_scatter(
                x, _FSDP, scatter_dimension=0, tiled=True, axis_index_groups=self._group()
            )
        return jax.lax.psum(x, _TENSOR) if self.tensor > 1 else x

    def own_tokens(self, x: jax.Array) -> jax.Array:
        """Returns this device's tokens [C] of an array over the tokens of its group [parts·C].

        Undoes `collect_tokens` along axis 0.
        """
        if self.parts == 1:
            return x
        size = x.shape[0] // self.parts
        return jax.lax.dynamic_slice_in_dim(x, self._part() * size, size)

    def _part(self) -> jax.Array:
        """Returns this device's index in its group, an int32 scalar."""
        return jax.lax.axis_index(_FSDP).astype(jnp.int32) % self.parts

    def first_column(self) -> tuple[jax.Array | int, jax.Array | int]:
        """Returns the vocabulary id of this device's first column, and how many are not padding."""
        if self.parts == self.tensor == 1:
            return 0, self.columns
        shard = jax.lax.axis_index(_TENSOR).astype(jnp.int32)
        part = self._part()
        return shard * self.columns + part * self.width, self.columns - part * self.width

    def merge(
        self, highest: jax.Array, total: jax.Array, logit: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Merges softmax statistics over each device's columns to those over the vocabulary.

        Args:
          highest: float32 [parts·C], highest logit among this device's columns.
          total: float32 [parts·C], Σ exp(logit − highest) over them.
          logit: float32 [parts·C], the target's logit, 0 where another device holds its column.

        Returns:
          The same three over all columns.
        """
        for size, axis, groups in (
            (self.parts, _FSDP, self._group()),
            (self.tensor, _TENSOR, None),
        ):
            if size > 1:
                stats = jnp.stack([highest, total, logit])
                each = jax.lax.all_gather(
                    stats, axis, axis_index_groups=groups
                )  # [size, 3, parts·C]
                highest = each[:, 0].max(axis=0)
                total = jnp.sum(jnp.exp(each[:, 0] - highest) * each[:, 1], axis=0)
                logit = each[:, 2].sum(axis=0)
        return highest, total, logit


def vocab_split(tokens: int, vocab: int, parts: int = 0) -> VocabSplit:
    """Returns the split of a vocabulary for the current mesh.

    Args:
      tokens: number of tokens per device.
      vocab: vocabulary size V.
      parts: size of the groups along `fsdp`; 0 selects `best_parts`.

    Raises:
      UserError: `parts` does not divide the `fsdp` axis.
    """
    if not on_mesh():
        return VocabSplit(vocab)
    shape = current_mesh().shape
    fsdp, tensor = shape[_FSDP], shape[_TENSOR]
    if parts and fsdp % parts:
        raise UserError(
            f"loss.vocab_parts={parts} does not divide mesh.fsdp={fsdp}; choose a divisor, "
            "or 0 for the best one"
        )
    columns = vocab // tensor
    return VocabSplit(columns, parts or best_parts(tokens, columns, fsdp), fsdp, tensor)
