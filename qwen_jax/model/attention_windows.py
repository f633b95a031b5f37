"""Layer-wise sliding windows of the report's §2.5: window sizes by layer."""

from __future__ import annotations

from qwen_jax.errors import UserError


def layer_windows(
    n_layers: int,
    trained_length: int,
    *,
    layers_per_window: int = 4,
    longest: int | None = None,
) -> tuple[int | None, ...]:
    """Returns the sliding window of each layer for `ModelConfig.windows`, smaller in lower layers.

    The report gives no sizes. These are what its authors describe for a model trained at 2,048
    tokens (github.com/QwenLM/Qwen, issue 422): 2,048 in the first four layers, 4,096 in the next
    four, 8,192 above, and so on; here the doubling continues to the top layer. Released
    configurations have no windows. With a window of w, a token attends to itself and the w − 1
    tokens before it.

    Args:
      n_layers: layers of the model.
      trained_length: S, the window of the lowest layers, in which no distance exceeds those of the
        training.
      layers_per_window: number of layers after which the window doubles.
      longest: longest sequence to be run, in tokens; a layer whose window covers it becomes a full
        layer (None). Without it, every layer has a window.

    Raises:
      UserError: a number below 1.
    """
    for name, value in (
        ("n_layers", n_layers),
        ("trained_length", trained_length),
        ("layers_per_window", layers_per_window),
        ("longest", 1 if longest is None else longest),
    ):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    windows = (trained_length * 2 ** (i // layers_per_window) for i in range(n_layers))
    return tuple(None if longest is not None and w >= longest else w for w in windows)
