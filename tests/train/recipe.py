"""The job of `tests/train/jobs.py` as a recipe: `--config=tests/train/recipe.py:FOLDER`."""

from qwen_jax.config import to_config_dict
from tests.train import jobs


def get_config(folder):
    return to_config_dict(jobs.make(folder))
