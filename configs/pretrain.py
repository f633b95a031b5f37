"""Pretraining recipes (report §2.4), from a laptop toy to 72B.

    python -m launch.pretrain --config=configs/pretrain.py:7b --workdir=runs/7b \\
        --checkpoints=gs://…/7b --config.tokenizer=qwen.tiktoken \\
        --config.data.sources=/data/web=0.7,/data/code=0.3

The argument after the colon is a size of Table 1 (`1.8b`, `7b`, `14b`, and the released `72b`), any
released model by its full name (`qwen2.5-0.5b`, `qwen3-8b`, …; see qwen_jax/model/presets.py),
`demo` (the recipe of `make demo`) or `toy` (seconds on a CPU, for tests).

Where the report gives no number (warm-up, decay, clipping), those of the technical memo of the
first Qwen-7B are used.
"""

import dataclasses

import ml_collections

from qwen_jax.config import to_config_dict
from qwen_jax.data import DataConfig
from qwen_jax.errors import UserError, nearest
from qwen_jax.model import ForwardOptions, ModelConfig
from qwen_jax.model.presets import PRESETS, preset
from qwen_jax.parallel import MeshConfig
from qwen_jax.train.config import LossConfig, RunConfig
from qwen_jax.train.job import PretrainJob
from qwen_jax.train.optimizer import OptimizerConfig

# Training tokens: report Table 1; 72B from the release's README.
TOKENS = {"1.8b": 2.2e12, "7b": 2.4e12, "14b": 3.0e12, "72b": 3.0e12}


def get_config(size: str = "7b") -> ml_collections.ConfigDict:
    """Returns the recipe of this name as a config whose keys the command line may override.

    Raises:
      UserError: there is no such recipe.
    """
    small = {"toy": toy, "demo": demo}
    known = (*TOKENS, *small, *PRESETS)
    if size not in known:
        raise UserError(
            f"recipe {size!r} is unknown{nearest(size, known)}; choose one of {', '.join(known)}"
        )
    return to_config_dict(small[size]() if size in small else report(size))


def report(size: str) -> PretrainJob:
    """Returns the report's pretraining job for a released architecture."""
    model = preset(f"qwen-{size}" if size in TOKENS else size)
    seq_len = 2048  # report §2.4
    global_batch = 2048  # memo: 2048 sequences; Table 1: 4M tokens
    # Other families: the 7B's token count; override train.steps.
    steps = int(TOKENS.get(size, 2.4e12) / (seq_len * global_batch))
    return PretrainJob(
        # Long-context settings are part of the model's config; training never applies them.
        model=dataclasses.replace(model, trained_length=seq_len, max_length=seq_len)
        if model.family == "qwen"
        else model,
        tokenizer="qwen.tiktoken",
        # The report joins documents and cuts them to length. It does not say whether attention is
        # confined to documents, and its released model does not do so: plain packing.
        data=DataConfig(
            sources="", seq_len=seq_len, global_batch=global_batch, packing="plain", seed=0
        ),
        options=ForwardOptions(dtype="bfloat16", remat="full"),  # bf16: report §2.4
        mesh=MeshConfig(data=1, fsdp=-1, context=1, tensor=1),
        optimizer=OptimizerConfig(
            peak_lr=3e-4,  # report Table 1, all three sizes
            final_lr_ratio=0.1,  # report §2.4: cosine to 10 % of the peak
            warmup_steps=2000,  # memo
            decay_steps=-1,  # the last step
            b1=0.9,  # report §2.4
            b2=0.95,
            eps=1e-8,  # report §2.4 (the memo says 1e-6)
            weight_decay=0.1,  # memo
            clip_norm=1.0,  # memo
        ),
        loss=LossConfig(z_loss=0.0, chunk=2048),  # docs/design.md, "Loss without logits"
        train=RunConfig(
            steps=steps, log_every=10, eval_every=1000, checkpoint_every=1000, keep_every=10_000
        ),
    )


def demo() -> PretrainJob:
    """Returns the job of `make demo`: a few million parameters, minutes on 8 CPU devices.

        python -m launch.demo --workdir=runs/demo

    A step takes half a second of CPU time, so 1,100 steps take about five minutes on two cores;
    they cover three fifths of the corpus, the Python standard library. Numbers that are not the
    report's were chosen by short runs with one seed each; losses in the comments are those of
    held-out code.

    Result on the standard library of Python 3.11.7, in bits per byte of held-out code and prose:
    1.774 and 2.127 (gzip 2.005 and 2.489, xz 1.757 and 2.286, byte 8-gram 1.826 and 2.136).
    """
    steps = 1100
    return PretrainJob(
        model=ModelConfig(
            family="qwen",
            vocab_size=4096,  # 3,888 trained ranks and 208 control tokens
            # 4 layers of 192 give 1.880 bits per byte, 2 of 256 give 1.894 (both with init 0.02).
            d_model=192,
            n_layers=4,
            n_heads=4,
            n_kv_heads=4,
            head_dim=48,
            d_ff=512,  # 8/3 · 192 (report §2.3)
            max_length=256,
            trained_length=256,
            dynamic_ntk=True,
            logn=True,
            # The released models' 0.02 is for 4,096 channels; 192 channels need about 1/√192 = 0.07
            # for outputs of the same size. After 200 steps the loss is 5.08; with 0.02 it is 5.27.
            init_std=0.05,
        ),
        tokenizer="runs/demo/tokenizer.tiktoken",
        # 2,048 tokens per step; with half of that, a token costs 15 % more CPU time.
        data=DataConfig(sources="", seq_len=256, global_batch=8, packing="masked", seed=0),
        # Saving less is faster here, since memory traffic dominates: "none" is 8 % slower.
        options=ForwardOptions(dtype="bfloat16", remat="qkv_out"),
        mesh=MeshConfig(data=1, fsdp=4, context=1, tensor=2),
        optimizer=OptimizerConfig(
            peak_lr=2e-3,  # loss after 400 steps: 4.69; with 4e-3, 4.81 (both with init 0.02)
            final_lr_ratio=0.0,  # a single short run, so down to 0
            warmup_steps=50,
            decay_steps=-1,
        ),
        loss=LossConfig(chunk=512),
        train=RunConfig(
            steps=steps, log_every=10, eval_every=275, checkpoint_every=100, keep_last=2
        ),
    )


def toy() -> PretrainJob:
    """Returns the job of the tests: the smallest model with all parts of a Qwen."""
    job = demo()
    return dataclasses.replace(
        job,
        model=dataclasses.replace(
            job.model,
            vocab_size=512,
            d_model=64,
            n_layers=2,
            n_heads=2,
            n_kv_heads=2,
            head_dim=32,
            d_ff=96,
            max_length=64,
            trained_length=64,
            init_std=0.02,
        ),
        data=dataclasses.replace(job.data, seq_len=64, global_batch=8),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_steps=4, decay_steps=-1),
        train=RunConfig(steps=20, log_every=1, checkpoint_every=5, tensorboard=False),
    )
