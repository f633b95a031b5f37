"""Compiles one of MaxText's own recipes ahead of time and writes the HLO and memory figures.

Run by `benchmarks.maxtext_pods` with a Python that can import MaxText; imports nothing of this
project. Calls MaxText's own `train_compile` with the recipe's own XLA flags and settings, read from
the checkout, and records its results: the scheduled HLO in `OUT.hlo`, memory and the torus
coordinates of the mesh's devices in `OUT.json`.

    python maxtext_child.py '{"checkout": …, "module": …, "recipe": …, "overrides": {…}, "out": …}'
"""

import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
import time


def read_recipe(case):
    """Reads a recipe from MaxText's benchmarks.

    Args:
      case: dict with "checkout" (MaxText's repository), "module" and "recipe" (where it is listed),
        "overrides" of its settings, and optionally "flag_groups" (names of flag sets of MaxText's
        library to use instead of the recipe's) and "without_flags" (flags that contain one of these
        words are dropped).

    Returns:
      (settings, list of XLA flags).
    """
    sys.path[:0] = [case["checkout"], os.path.join(case["checkout"], "src")]
    module = importlib.import_module(case["module"])
    listed = [value for value in vars(module).values() if hasattr(value, "tuning_params")]
    model = next(m for m in listed if m.model_name == case["recipe"])
    settings = {"model_name": model.model_type} | model.tuning_params | case["overrides"]
    library = importlib.import_module("benchmarks.xla_flags_library")
    groups = case.get("flag_groups")
    text = model.xla_flags if groups is None else " ".join(vars(library)[g] for g in groups)
    dropped = case.get("without_flags", [])
    return settings, [flag for flag in text.split() if not any(word in flag for word in dropped)]


def compile_recipe(case, settings, folder):
    """Runs MaxText's ahead-of-time compilation with a dump of the HLO in `folder`.

    Returns:
      (compiled program, device mesh, seconds of compilation).
    """
    from maxtext.trainers.pre_train import train_compile
    from maxtext.utils import max_utils

    recorded = {}
    compile_step, parse = train_compile.jit_and_compile, max_utils.parse_libtpu_flags_to_dict

    def compile_and_record(function, args, kwargs, mesh, *rest):
        start = time.monotonic()
        compiled = compile_step(function, args, kwargs, mesh, *rest)
        recorded.update(compiled=compiled, mesh=mesh, seconds=time.monotonic() - start)
        return compiled

    train_compile.jit_and_compile = compile_and_record
    max_utils.parse_libtpu_flags_to_dict = lambda text: (
        parse(text) | {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    )
    base = pathlib.Path(case["checkout"], "src/maxtext/configs/base.yml")
    argv = ["train_compile", str(base), *(f"{key}={value}" for key, value in settings.items())]
    train_compile.main(argv)
    return recorded["compiled"], recorded["mesh"], recorded["seconds"]


def scheduled_hlo(folder, compiled):
    """Returns the scheduled HLO text that libtpu has dumped, or jaxlib's text without a dump."""
    for stage in ("after_codegen", "after_optimizations"):
        files = sorted(pathlib.Path(folder).glob(f"*train_step*.{stage}.txt"))
        if files:
            return files[-1].read_text(errors="replace")
    return compiled.as_text()


def write_atomically(path, text):
    """Writes a file completely or not at all."""
    partial = f"{path}.partial"
    pathlib.Path(partial).write_text(text)
    os.replace(partial, path)


def main():
    """Compiles the recipe of the JSON argument and writes `OUT.hlo` and `OUT.json`."""
    case = json.loads(sys.argv[1])
    settings, flags = read_recipe(case)
    # libtpu reads its flags when it is loaded, as in MaxText's own scripts.
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(flags)
    with tempfile.TemporaryDirectory() as folder:
        compiled, mesh, seconds = compile_recipe(case, settings, folder)
        hlo = scheduled_hlo(folder, compiled)
    memory = compiled.memory_analysis()
    facts = {
        "settings": {key: str(value) for key, value in settings.items()},
        "flags": flags,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "host_bytes": memory.host_temp_size_in_bytes,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "coordinates": [list(device.coords) for device in mesh.devices.flat],
        "compile_seconds": round(seconds, 1),
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "libtpu", "flax")},
    }
    write_atomically(case["out"] + ".hlo", hlo)
    write_atomically(case["out"] + ".json", json.dumps(facts))


if __name__ == "__main__":
    main()
