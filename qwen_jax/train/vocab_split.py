"""How the output vocabulary is divided among devices, and the collectives that follow from it.

Columns of the output projection are split over `tensor`, and again over groups of neighbours along
`fsdp`. The members of a group show each other their tokens, and each takes one part of the columns
for all of them. A device then holds its part of the kernel, and of the kernel's gradient, instead
of the whole; and it moves fewer bytes, because where a vocabulary is much larger than a device's
tokens, hidden states are the smaller thing to send. Runs inside `shard_map`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from qwen_jax.errors import UserError
from qwen_jax.parallel import RULES, current_mesh, on_mesh

_FSDP, _TENSOR = RULES["embed"], RULES["vocab"]

# Width of a TPU register. Parts that end elsewhere make the TPU compiler replace a reduce-scatter
# by an all-reduce, which moves twice the bytes.
_LANES = 128


def best_parts(tokens: int, columns: int, fsdp: int) -> int:
    """Size of the groups along `fsdp` that moves the fewest bytes.

    With g parts a device receives 2·D·columns/g bytes of a bf16 kernel, sends 4·D·columns/g of its
    float32 gradient, and exchanges (2 + 4)·D·g·tokens for hidden states and their gradient. The sum
    is least at g² = columns/tokens, and flat around it; rounding up halves what a device holds.

    Args:
      tokens: per device. columns: of the vocabulary, per `tensor` shard. fsdp: size of the axis.

    Returns:
      The power of two at or above the optimum, at most the largest that divides `fsdp`.
    """
    best = 2 ** max(0, math.ceil(math.log2(columns / tokens) / 2))
    return min(best, fsdp & -fsdp)


@dataclasses.dataclass(frozen=True)
class VocabSplit:
    """Which columns of the output projection [D,V] a device holds while the loss is computed.

    Attributes:
      columns: V/tensor, of one `tensor` shard.
      parts: neighbours along `fsdp` that divide those among them, `width` columns each.
      fsdp, tensor: sizes of the axes; 1 without a mesh.
    """

    columns: int
    parts: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def width(self) -> int:
        """Columns per device; with `padding` at the end of the last part, where that is cheap."""
        width = -(-self.columns // self.parts)
        cheap = self.parts > 1 and width >= 8 * _LANES
        return -(-width // _LANES) * _LANES if cheap else width

    @property
    def padding(self) -> int:
        """Columns that stand for no token, over all the parts of a `tensor` shard."""
        return self.parts * self.width - self.columns

    def _group(self) -> dict:
        """The devices that divide the columns among them, for every group."""
        starts = range(0, self.fsdp, self.parts)
        return {"axis_index_groups": [[q + r for r in range(self.parts)] for q in starts]}

    def _peers(self) -> dict:
        """The devices that hold the same columns, one of each group, for every part."""
        if self.parts == 1:
            return {}
        starts = range(0, self.fsdp, self.parts)
        return {"axis_index_groups": [[q + r for q in starts] for r in range(self.parts)]}

    def collect_kernel(self, kernel: jax.Array) -> jax.Array:
        """[D/fsdp,columns], as at rest, to [D,width]: this device's columns."""
        if self.parts > 1:
            kernel = jnp.pad(kernel, ((0, 0), (0, self.padding)))
            kernel = jax.lax.all_to_all(kernel, _FSDP, 1, 0, tiled=True, **self._group())
        if self.fsdp > self.parts:
            kernel = jax.lax.all_gather(kernel, _FSDP, axis=0, tiled=True, **self._peers())
        return kernel

    def scatter_kernel(self, gradient: jax.Array) -> jax.Array:
        """Transpose of `collect_kernel`: [D,width] of each device to their sum, as at rest."""
        if self.fsdp > self.parts:
            gradient = jax.lax.psum_scatter(
                gradient, _FSDP, scatter_dimension=0, tiled=True, **self._peers()
            )
        if self.parts > 1:
            gradient = jax.lax.all_to_all(gradient, _FSDP, 0, 1, tiled=True, **self._group())
            gradient = gradient[:, : self.columns]
        return gradient

    def collect_tokens(self, x: jax.Array, axis: int) -> jax.Array:
        """Size C along `axis` on this device to parts·C, the tokens of its group."""
        if self.parts == 1:
            return x
        return jax.lax.all_gather(x, _FSDP, axis=axis, tiled=True, **self._group())

    def scatter_tokens(self, x: jax.Array) -> jax.Array:
        """[parts·C,…], a term from each holder of columns, to their sum [C,…] where it belongs."""
        if self.parts > 1:
            x = jax.lax.psum_scatter(x, _FSDP, scatter_dimension=0, tiled=True, **self._group())
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
        """Vocabulary index of this device's first column, and how many of its columns are real."""
        if self.parts == self.tensor == 1:
            return 0, self.columns
        shard = jax.lax.axis_index(_TENSOR).astype(jnp.int32)
        part = self._part()
        return shard * self.columns + part * self.width, self.columns - part * self.width

    def merge(self, highest: jax.Array, total: jax.Array, logit: jax.Array):
        """Softmax statistics over one device's columns to those over the vocabulary.

        Args:
          highest: max of the logits. total: Σ exp(logit − highest). logit: the target's, 0 where
            another device holds it. All float32 [C].

        Returns:
          The same three over all columns.
        """
        for size, axis, groups in ((self.parts, _FSDP, self._group()), (self.tensor, _TENSOR, {})):
            if size > 1:
                stats = jnp.stack([highest, total, logit])
                each = jax.lax.all_gather(stats, axis, **groups)  # [size,3,C]
                highest = each[:, 0].max(axis=0)
                total = jnp.sum(jnp.exp(each[:, 0] - highest) * each[:, 1], axis=0)
                logit = each[:, 2].sum(axis=0)
        return highest, total, logit


def vocab_split(tokens: int, vocab: int, parts: int = 0) -> VocabSplit:
    """The split for the mesh in force.

    Args:
      tokens: per device. vocab: V. parts: size of the groups along `fsdp`; 0: `best_parts`.

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
            "or 0 to have it chosen"
        )
    columns = vocab // tensor
    return VocabSplit(columns, parts or best_parts(tokens, columns, fsdp), fsdp, tensor)
