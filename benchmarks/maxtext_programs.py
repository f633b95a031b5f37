"""Programs that `benchmarks.maxtext_pods` compares: MaxText's recipes and ours, slice by slice."""

from __future__ import annotations

import dataclasses
from typing import Any

from qwen_jax.model import ModelConfig
from qwen_jax.model.presets import preset

# libtpu 0.0.51 rejects these flags on v5p and v6e as "might lead to incorrect results".
_NO_FUSION = {"without_flags": ["async_collective_fusion"]}
_OFFLOAD = "ENABLE_SPARSECORE_OFFLOADING_FOR_RS_AG_AR"


@dataclasses.dataclass(frozen=True)
class PodProgram:
    """One program of the table: a recipe of MaxText or of ours for one slice.

    Attributes:
      name: shown in the table and part of its file names.
      slice: name of the slice as sold, such as "v5e-256".
      topology: name of the slice in libtpu, such as "v5e:16x16".
      length: tokens per row.
      rows: rows per chip.
      model: configuration of the trained model, for FLOPs.
      theirs: recipe of MaxText: arguments of `maxtext_child.read_recipe`; empty for ours.
      ours: arguments of `launch.aot`; empty for MaxText's.
    """

    name: str
    slice: str
    topology: str
    length: int
    rows: int
    model: ModelConfig
    theirs: dict[str, Any] = dataclasses.field(default_factory=dict)
    ours: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _SliceShape:
    """Slice and batch that the programs of a group share; attributes as in `PodProgram`."""

    slice: str
    topology: str
    length: int
    rows: int

    def maxtext(self, label: str, model: ModelConfig, recipe: dict[str, Any]) -> PodProgram:
        """Returns the program of a MaxText recipe (`_recipe`)."""
        return PodProgram(
            name=f"maxtext {label} {self.slice}",
            model=model,
            theirs=recipe,
            **dataclasses.asdict(self),
        )

    def qwen_jax(self, label: str, model: ModelConfig, *arguments: str) -> PodProgram:
        """Returns the program of our recipe, given by arguments of `launch.aot`."""
        return PodProgram(
            name=f"qwen_jax {label} {self.slice}",
            model=model,
            ours=(
                *arguments,
                f"--topology={self.topology}",
                f"--seq_len={self.length}",
                f"--per_device_batch={self.rows}",
                "--config.train.microbatches=1",
            ),
            **dataclasses.asdict(self),
        )


def _recipe(module: str, recipe: str, **more: Any) -> dict[str, Any]:
    """Returns arguments of `maxtext_child.read_recipe` for a recipe of MaxText's benchmarks."""
    return {"module": f"benchmarks.{module}", "recipe": recipe} | more


def make_programs() -> list[PodProgram]:
    """Returns all programs, with those to be compared next to each other."""
    qwen = preset("qwen-7b")
    # Llama-2-7B has Qwen-7B's widths and depth, no biases and a vocabulary of 32,000.
    llama = dataclasses.replace(qwen, vocab_size=32_000)
    qwen3 = preset("qwen3-8b")
    v5e = _recipe("maxtext_v5e_model_configs", "llama2-7b-v5e-256")
    v5p = _recipe("maxtext_v5p_model_configs", "llama2_7b_v5p_128")
    v6e = _recipe("maxtext_trillium_model_configs", "llama2-7b-4096")
    offloaded_v5p = {"flag_groups": ["DATA_PARALLEL_OVERLAP", _OFFLOAD]}
    offloaded_v6e = {"flag_groups": ["DENSE_VMEM_LIMIT_FLAG", _OFFLOAD]}
    ours_v5e = ("--config=configs/pods.py:7b,v5e-256", "--config.options.remat=attention")
    ours_v5p = ("--config=configs/pods.py:7b,v5p-128", "--config.options.remat=products")
    ours_v6e = (
        "--config=configs/pods.py:7b,v6e-256",
        "--config.options.remat=full:16,out",
        "--config.loss.chunk=8192",
    )
    ours_qwen3 = ("--config=configs/pretrain.py:qwen3-8b", "--config.options.remat=attention")
    on_v5e = _SliceShape("v5e-256", "v5e:16x16", length=2048, rows=4)
    on_v5p = _SliceShape("v5p-128", "v5p:4x4x4", length=4096, rows=4)
    on_v6e = _SliceShape("v6e-256", "v6e:16x16", length=4096, rows=12)

    def qwen3_with(remat):
        return v5e | {"overrides": {"model_name": "qwen3-8b", "remat_policy": remat}}

    return [
        on_v5e.maxtext("llama2-7b", llama, v5e),
        on_v5e.qwen_jax("qwen-7b", qwen, *ours_v5e),
        on_v5e.qwen_jax(
            "qwen-7b vocabulary 32000", llama, *ours_v5e, "--config.model.vocab_size=32000"
        ),
        on_v5p.maxtext("llama2-7b", llama, v5p | _NO_FUSION),
        on_v5p.maxtext("llama2-7b SparseCore", llama, v5p | offloaded_v5p),
        on_v5p.qwen_jax("qwen-7b", qwen, *ours_v5p),
        on_v6e.maxtext("llama2-7b", llama, v6e | _NO_FUSION),
        on_v6e.maxtext("llama2-7b SparseCore", llama, v6e | offloaded_v6e),
        on_v6e.qwen_jax("qwen-7b", qwen, *ours_v6e),
        on_v5e.maxtext("qwen3-8b full", qwen3, qwen3_with("full")),
        on_v5e.maxtext("qwen3-8b save_qkv_proj", qwen3, qwen3_with("save_qkv_proj")),
        on_v5e.qwen_jax("qwen3-8b", qwen3, *ours_qwen3),
    ]
