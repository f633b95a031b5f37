"""The second start of a program finds what the first compiled; a bad folder is one sentence."""

import jax
import pytest

from qwen_jax.compile_cache import use_compile_cache
from qwen_jax.errors import UserError
from tests import multiprocess, programs
from tests.train import jobs


@pytest.mark.slow
def test_second_run_reads_every_program_from_the_cache(tmp_path):
    """What the program says it did agrees with the files that are there."""
    jobs.write_data(tmp_path)
    config = ["--config=tests/train/recipe.py:" + str(tmp_path), "--cpu_devices=8"]
    config += ["--config.train.steps=1", "--config.eval="]
    cache = tmp_path / "compiled"
    first, second = programs.run(
        [
            ["launch.pretrain", *config, f"--compile_cache={cache}", f"--workdir={tmp_path}/{run}"]
            for run in ("first", "second")
        ]
    )
    assert first.status == second.status == 0, first.output + second.output
    entries = [path.name for path in cache.iterdir() if path.name.endswith("-cache")]
    assert any("train_step" in name for name in entries), entries
    said = f"compile cache {cache}: "
    assert f"{said}0 programs taken from it, {len(entries)} added" in first.output
    assert f"{said}{len(entries)} programs taken from it, 0 added" in second.output
    assert [p.name for p in cache.iterdir() if p.name.endswith("-cache")] == entries
    assert not list(cache.glob(".writable*"))


def _compile_with(cache: str) -> list[int]:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    counts = use_compile_cache(cache)
    jax.block_until_ready(jax.jit(lambda x: x * 2 + 1)(jax.numpy.arange(7)))
    return [counts.hits, counts.added]


def test_processes_of_one_host_can_share_the_folder(tmp_path):
    (first,) = multiprocess.run(_compile_with, processes=1, devices=1, cache=str(tmp_path))
    (second,) = multiprocess.run(_compile_with, processes=1, devices=1, cache=str(tmp_path))
    assert first[0] == 0 and first[1] > 0
    assert second == [first[1], 0]


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    for folder in (tmp_path / "file" / "cache", "/proc/cache", "gs://no-such-bucket-9c1f/x"):
        if str(folder).startswith("gs://") and _has_gcs():
            continue  # would ask the network
        with pytest.raises(UserError, match=r"The compile cache .* cannot be written") as caught:
            use_compile_cache(str(folder))
        assert "\n" not in str(caught.value)
    assert jax.config.jax_compilation_cache_dir == before


def _has_gcs() -> bool:
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        return False
    return True
