"""Pretrains a Qwen model, or resumes an interrupted run.

    python -m launch.pretrain --config=configs/pretrain.py:7b --workdir=DIR \\
        --config.tokenizer=qwen.tiktoken --config.data.sources=DIR=0.7,DIR=0.3

`--config.key=value` changes any setting of the recipe. On several hosts, start the same command on
each; qwen_jax/parallel/distributed.py describes how the processes connect. metrics.jsonl,
TensorBoard files and checkpoints are written to --workdir; with several hosts, --checkpoints names
a folder that all of them see (gs:// too).

Exit status: 0 if the run is complete, or was asked to stop and has saved a checkpoint; 2 after bad
input or diverged training; 69 if a process of the job failed to join. A scheduler that must
distinguish a stopped run, which it should start again, from a complete one sets --stopped_status
(as the jobs of launch/cluster do).
"""

from absl import flags, logging
from ml_collections import config_flags

from launch import program
from qwen_jax.config import from_config_dict
from qwen_jax.errors import UserError
from qwen_jax.train.job import PretrainJob
from qwen_jax.train.pretrain import pretrain

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: configs/pretrain.py:SIZE.")
WORKDIR = flags.DEFINE_string("workdir", None, "Local folder for metrics and checkpoints.")
CHECKPOINTS = flags.DEFINE_string(
    "checkpoints", None, "Folder for checkpoints, such as gs://…; WORKDIR/checkpoints by default."
)
STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    0,
    "Exit status of a run that was asked to stop (SIGTERM) before its last step.",
    lower_bound=0,
    upper_bound=255,
)


def main() -> int:
    """Runs the job of the flags and logs the evaluation; returns the exit status.

    Raises:
      UserError: a required flag is missing, or the job cannot run.
    """
    if CONFIG.value is None:
        raise UserError("--config is missing: give a recipe, such as configs/pretrain.py:7b")
    if not WORKDIR.value:
        raise UserError("--workdir is missing: give a folder for checkpoints and metrics")
    job = from_config_dict(PretrainJob, CONFIG.value)
    outcome = pretrain(job, WORKDIR.value, CHECKPOINTS.value)
    for name, held_out in outcome.evaluations.items():
        logging.info("%s: %.4f bits per byte held out", name, held_out.bits_per_byte)
    if not outcome.finished:
        logging.info("stopped at step %d; run the same command to resume", outcome.step)
        return STOPPED_STATUS.value
    return 0


if __name__ == "__main__":
    program.run(main, recipe=PretrainJob)
