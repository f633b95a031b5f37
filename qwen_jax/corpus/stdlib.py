"""Real text that every machine with Python already has: the standard library of the interpreter.

Two components, from the same modules:

* `code`: each module's source, whole.
* `prose`: each module's docstrings and comment blocks, gathered into one document per module, and
  the language reference that `pydoc` carries (`pydoc_data/topics.py`), one document per topic.

The train/held-out split is by module path and comes *before* extraction, so that neither the
source nor a docstring of a held-out module is ever in the training documents. It cannot undo what
the library's authors copied from one module into another.

No network, no import of the modules, no dependence on the order of the file system. English and
Python only: 11 to 12 MB of sources without the test suite (which slim images do not carry),
31 MB with it.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import os
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Iterator

from absl import logging

from qwen_jax.corpus.documents import Document, unit_hash
from qwen_jax.errors import UserError

COMPONENTS = ("code", "prose")

_TOPICS = "pydoc_data/topics.py"
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "_bundled", "lib-dynload"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}
# Written by the build or holding its machine's paths, hence different on every machine.
_SKIPPED_FILES = re.compile(r"(^|/)_sysconfigdata[^/]*\.py$|^config-")
_MIN_PROSE_BYTES = 200
# A line of nothing but constants: strings, numbers, separators, brackets and a comment. Possessive
# quantifiers (`*+`) keep the match linear.
_STRING = r"""[uUbBrR]{0,2}(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")"""
_NUMBER = r"[-+]?(?:0[xX][0-9a-fA-F]++|\d[\d_.eE]*+)"
_DATA_LINE = re.compile(
    rf"^[\s(\[{{]*+(?:{_STRING}|{_NUMBER})"
    rf"(?:[\s,:()\[\]{{}}]++|{_STRING}|{_NUMBER}|None|True|False)*+(?:#.*)?$"
)
_TABLE_MIN_CHARS = 2000
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of both sides of the split, each sorted by id; `source` names the component."""

    train: tuple[Document, ...]
    heldout: tuple[Document, ...]


@dataclasses.dataclass(frozen=True)
class _Module:
    """Relative path, source text and syntax tree (None where this interpreter rejects it)."""

    path: str
    text: str
    tree: ast.Module | None


def load(
    *,
    root: str | os.PathLike | None = None,
    heldout: float = 0.03,
    seed: int = 0,
    max_bytes: int | None = None,
    tests: bool = False,
) -> Corpus:
    """Collects the standard library as training and held-out documents.

    Args:
      root: library folder; None is the running interpreter's.
      heldout: expected share of modules to hold out, in [0, 1).
      seed: of the split, and of the choice of modules under `max_bytes`.
      max_bytes: stop taking modules, in an order given by hashes of their paths, once this many
        UTF-8 bytes of documents are collected (both sides together); None takes all.
      tests: include the test suite where it is installed.

    Returns:
      The documents; ids are `stdlib/<component>/<module path>`, sources "code" and "prose".

    Raises:
      UserError: arguments out of range, or a `root` without Python sources.
    """
    if not 0 <= heldout < 1:
        raise UserError(f"heldout is {heldout}; it must be a share of modules in [0, 1).")
    if max_bytes is not None and max_bytes <= 0:
        raise UserError(f"max_bytes is {max_bytes}; it must be positive, or None for all.")
    root = pathlib.Path(root if root is not None else sysconfig.get_path("stdlib"))
    paths = _paths(root, tests)
    if not paths:
        raise UserError(f"No Python sources under {root}; give the folder of a standard library.")
    held = {path for path in paths if unit_hash(seed, path) < heldout}
    if max_bytes is not None:
        paths = sorted(paths, key=lambda path: unit_hash(seed, f"order:{path}"))
    taken, total = [], 0
    for path in paths:
        module = _read(root, path)
        documents = _extract(module) if module else []
        if documents:
            taken.append((path in held, path, module.text, documents))  # Not its tree.
        total += sum(len(document.text.encode()) for document in documents)
        if max_bytes is not None and total >= max_bytes:
            break
    corpus = _split(taken)
    logging.info(
        "Standard library at %s: %d training and %d held-out documents, %.1f MB.",
        root,
        len(corpus.train),
        len(corpus.heldout),
        total / 1e6,
    )
    return corpus


def _split(taken: list[tuple[bool, str, str, list[Document]]]) -> Corpus:
    """Divides (held out?, path, source text, documents), and drops exact copies.

    Of several copies the first by (training before held-out, path) stays: a module is never held
    out while a copy of it is trained on.
    """
    sides: tuple[list[Document], list[Document]] = ([], [])
    seen = set()

    def is_new(text: str) -> bool:
        key = hashlib.sha256(text.strip().encode()).digest()
        return not (key in seen or seen.add(key))

    for is_held, _, text, documents in sorted(taken, key=lambda entry: entry[:2]):
        if is_new(text):
            whole = [d for d in documents if d.text is text or is_new(d.text)]
            sides[is_held].extend(whole)
    train, heldout = (tuple(sorted(side, key=lambda d: d.id)) for side in sides)
    return Corpus(train, heldout)


def _paths(root: pathlib.Path, tests: bool) -> list[str]:
    """Module paths below `root`, relative, with forward slashes, sorted."""
    skipped = _SKIPPED_FOLDERS if tests else _SKIPPED_FOLDERS | _TEST_FOLDERS
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        relative = pathlib.PurePath(folder).relative_to(root)
        found.extend((relative / name).as_posix() for name in files if name.endswith(".py"))
    return sorted(path for path in found if not _SKIPPED_FILES.search(path))


def _read(root: pathlib.Path, path: str) -> _Module | None:
    """A module, or None when it is empty, not UTF-8, or not text."""
    try:
        text = (root / path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    if not text.strip() or "\0" in text:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Invalid escapes in old modules are not ours to fix.
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        tree = None
    return _Module(path, text, tree)


def _extract(module: _Module) -> list[Document]:
    """All documents of one module."""
    if module.path == _TOPICS:
        return list(_topics(module))
    documents = []
    if not _is_table(module.text):
        documents.append(Document(f"stdlib/code/{module.path}", module.text, "code"))
    prose = "\n\n".join(_passages(module)) if module.tree else ""
    if len(prose.encode()) >= _MIN_PROSE_BYTES:
        documents.append(Document(f"stdlib/prose/{module.path}", prose + "\n", "prose"))
    return documents


def _is_table(text: str) -> bool:
    """True for generated data: most characters stand on lines that hold only constants."""
    if len(text) < _TABLE_MIN_CHARS:
        return False
    data = sum(len(line) for line in text.split("\n") if _DATA_LINE.match(line))
    return data > 0.5 * len(text)


def _topics(module: _Module) -> Iterator[Document]:
    """The language reference: every `name: text` pair of the module's one dictionary."""
    for node in ast.walk(module.tree) if module.tree else ():
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                yield Document(f"stdlib/prose/topics/{key.value}", f"{value.value}", "prose")


def _passages(module: _Module) -> list[str]:
    """Docstrings under their qualified names, and comment blocks, in source order."""
    found: list[tuple[int, str]] = []
    inside_strings: set[int] = set()

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, _DOCUMENTED):
            docstring = ast.get_docstring(node, clean=False)
            if docstring and docstring.strip():
                found.append((node.body[0].lineno, f"{name}\n\n{inspect.cleandoc(docstring)}"))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Constant | ast.JoinedStr):
                # Lines that look like comments inside a string are not comments.
                inside_strings.update(range(child.lineno, child.end_lineno + 1))
            elif isinstance(child, _DOCUMENTED):
                visit(child, f"{name}.{child.name}")
            else:
                visit(child, name)

    visit(module.tree, module.path.removesuffix(".py").replace("/", "."))
    found.extend(_comments(module.text, inside_strings))
    return [text for _, text in sorted(found)]


def _comments(text: str, inside_strings: set[int]) -> Iterator[tuple[int, str]]:
    """(line, text) of each run of comment lines that reads like prose."""
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#") and number not in inside_strings:
            block.append(stripped.lstrip("#!").removeprefix(" ").rstrip())
            continue
        if block:
            passage = "\n".join(block).strip("\n -=*")
            letters = sum(char.isalpha() or char.isspace() for char in passage)
            if len(passage.split()) >= 5 and letters > 0.8 * len(passage):
                yield number - len(block), passage
            block = []
