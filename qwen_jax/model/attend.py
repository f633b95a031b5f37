"""The protocol between a layer and its caller: what the queries of a layer attend to.

A layer computes queries, keys and values; the caller decides whether they attend to the tokens of
the batch (training), a dense cache, or the pages of the engine. There is one protocol for all.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax


class LayerContext(NamedTuple):
    """What `Attend` receives about the layer that calls it.

    Attributes:
      window: sliding window of the layer in tokens, static or an int32 scalar; None is unlimited.
      state: the layer's slice of the state that the caller gave to `network` (its part of a cache,
        its index into one); None without state.
      dropout_key: PRNG key of attention dropout, or None for no dropout.
    """

    window: jax.Array | int | None = None
    state: Any = None
    dropout_key: jax.Array | None = None


class Attend(Protocol):
    """Attention of one layer, given by the caller of the network."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerContext
    ) -> tuple[jax.Array, Any]:
        """Attends with the queries of a layer, and returns what the caller wants to keep.

        Letters: B batch, T tokens, N query heads, K kv heads, H head size.

        Args:
          q: [B, T, N, H], rotated queries, scaled by LogN where it applies.
          k: [B, T, K, H], rotated keys of the same tokens.
          v: [B, T, K, H], their values.
          layer: window, state and dropout key of this layer.

        Returns:
          (attention output [B, T, N, H], any tree of arrays; `network` stacks it over layers).
        """
        ...
