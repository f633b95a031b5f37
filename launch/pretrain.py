"""Pretrains a Qwen, or goes on where a killed run was.

    python -m launch.pretrain --config=configs/pretrain.py:7b --workdir=DIR \\
        --config.tokenizer=qwen.tiktoken --config.data.sources=DIR=0.7,DIR=0.3

Everything in the recipe can be changed with `--config.key=value`. On several hosts, start the same
command on each (see qwen_jax/parallel/distributed.py for how they find each other). metrics.jsonl,
TensorBoard files and, unless --checkpoints names a folder that all hosts see (gs:// too), the
checkpoints go to --workdir. Exit status: 0 done or stopped on request with a checkpoint, 2 bad
input or training that diverged, 69 processes of the job did not come. A scheduler that must tell a
stopped run, to be started again, from a finished one sets --stopped_status (launch/cluster renders
such jobs).
"""

from absl import flags, logging
from ml_collections import config_flags

from launch import program
from qwen_jax.config import from_config_dict
from qwen_jax.errors import UserError
from qwen_jax.train.job import PretrainJob
from qwen_jax.train.pretrain import pretrain

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, configs/pretrain.py:SIZE.")
WORKDIR = flags.DEFINE_string("workdir", None, "Local folder for metrics and checkpoints.")
CHECKPOINTS = flags.DEFINE_string(
    "checkpoints", None, "Folder for checkpoints, such as gs://…; WORKDIR/checkpoints by default."
)
STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status", 0, "Exit status of a run that was asked to stop (SIGTERM) before its end.",
    lower_bound=0, upper_bound=255,
)  # fmt: skip


def main() -> int:
    """Parses, trains, reports."""
    if CONFIG.value is None:
        raise UserError("--config is missing: give a recipe, such as configs/pretrain.py:7b")
    if not WORKDIR.value:
        raise UserError("--workdir is missing: give a folder for checkpoints and metrics")
    job = from_config_dict(PretrainJob, CONFIG.value)
    outcome = pretrain(job, WORKDIR.value, CHECKPOINTS.value)
    for name, held_out in outcome.evaluations.items():
        logging.info("%s: %.4f bits per byte held out", name, held_out.bits_per_byte)
    if not outcome.finished:
        logging.info("stopped at step %d; the same command goes on from there", outcome.step)
        return STOPPED_STATUS.value
    return 0


if __name__ == "__main__":
    program.run(main)
