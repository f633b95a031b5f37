"""The standard-library corpus: nothing held out reaches training, and it is the same every time."""

import pytest

from qwen_jax.corpus import stdlib
from qwen_jax.corpus.documents import unit_hash
from qwen_jax.errors import UserError


@pytest.fixture
def library(tmp_path):
    """Sixty modules, each with a secret word of its own in docstring, comment and code."""
    root = tmp_path / "lib"
    for i in range(60):
        path = root / f"package{i % 7}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'"""Module about secret{i}x, long enough to be worth a document. {"word " * 40}"""\n\n'
            f"# A comment about secret{i}x that is certainly long enough to stay.\n"
            f"def function(argument):\n"
            f'    """Returns secret{i}x for the argument given."""\n'
            f'    text = """\n# not a comment, this is inside a string\n"""\n'
            f"    return argument  # secret{i}x\n"
        )
    (root / "test").mkdir()
    (root / "test" / "test_one.py").write_text("# only with tests=True, which is not default\n")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "third_party.py").write_text("secret = 'not ours'\n")
    (root / "copy.py").write_text((root / "package0" / "module0.py").read_text())
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "table.py").write_text("t = {\n" + "    0x41: '\\u0042', # code\n" * 300 + "}\n")
    (root / "broken.py").write_text("def f(:\n")
    (root / "pydoc_data").mkdir()
    (root / "pydoc_data" / "topics.py").write_text(
        "topics = {'assert': 'The \"assert\" statement\\n'\n '***\\n',\n 'with': 'The with'}\n"
    )
    return root


def test_no_text_of_a_held_out_module_reaches_training(library):
    (library / "copy.py").unlink()
    corpus = stdlib.load(root=library, heldout=0.3)
    training = "\n".join(document.text for document in corpus.train)
    held = {d.id.rsplit("/", 1)[1] for d in corpus.heldout if "module" in d.id}
    assert 8 <= len(held) <= 28
    for i in range(60):
        name = f"module{i}.py"
        assert (f"secret{i}x" in training) == (name not in held)
        if name in held:  # Both components of a held-out module are held out.
            path = f"package{i % 7}/{name}"
            sides = {d.source for d in corpus.heldout if d.id.endswith(path)}
            assert sides == {"code", "prose"}
            assert unit_hash(0, path) < 0.3


def test_module_is_not_held_out_while_a_copy_is_trained_on(library):
    crossed = 0
    for seed in range(30):
        corpus = stdlib.load(root=library, heldout=0.4, seed=seed)
        held = [unit_hash(seed, path) < 0.4 for path in ("copy.py", "package0/module0.py")]
        crossed += held[0] != held[1]
        of_both = [("secret0x" in d.text) for d in corpus.heldout]
        assert sum(of_both) == (2 if all(held) else 0)  # One code, one prose document, or nothing.
        assert sum("secret0x" in d.text for d in corpus.train) == (0 if all(held) else 2)
    assert crossed > 5


def test_tables_and_generated_files_are_excluded_and_prose_is_extracted(library):
    corpus = stdlib.load(root=library, heldout=0)
    assert corpus.heldout == ()
    by_id = {d.id: d for d in corpus.train}
    code = {d.id.removeprefix("stdlib/code/") for d in corpus.train if d.source == "code"}
    assert "broken.py" in code  # Text is text, although this interpreter cannot parse it.
    assert not code & {"latin.py", "table.py", "pydoc_data/topics.py", "test/test_one.py"}
    assert not any("third_party" in name for name in by_id)
    assert by_id["stdlib/prose/topics/assert"].text == 'The "assert" statement\n***\n'
    prose = by_id["stdlib/prose/package1/module1.py"].text
    assert prose.startswith("package1.module1\n\nModule about secret1x")
    assert "package1.module1.function\n\nReturns secret1x" in prose
    assert "A comment about secret1x" in prose
    assert "not a comment" not in prose
    assert prose.index("Module about") < prose.index("A comment") < prose.index("Returns")
    with_tests = stdlib.load(root=library, heldout=0, tests=True)
    assert len(with_tests.train) == len(corpus.train) + 1


def test_smaller_size_limit_selects_a_subset_of_a_larger_one(library):
    small = stdlib.load(root=library, max_bytes=6000)
    large = stdlib.load(root=library, max_bytes=12000)
    whole = stdlib.load(root=library)
    size = sum(len(d.text.encode()) for d in (*small.train, *small.heldout))
    assert 5000 < size < 8000
    assert set(small.train) < set(large.train) < set(whole.train)
    assert set(small.heldout) <= set(large.heldout) <= set(whole.heldout)


def test_library_of_this_interpreter_yields_both_components():
    """Large enough to train on, both components, and no held-out source line count surprises."""
    corpus = stdlib.load(max_bytes=3_000_000)
    assert corpus == stdlib.load(max_bytes=3_000_000)
    for component in stdlib.COMPONENTS:
        assert sum(len(d.text) for d in corpus.train if d.source == component) > 300_000
    ids = [d.id for d in corpus.train]
    assert ids == sorted(set(ids))
    modules = {d.id.split("/", 2)[2] for d in corpus.heldout}
    assert modules and not modules & {d.id.split("/", 2)[2] for d in corpus.train}


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(UserError, match="heldout is 1"):
        stdlib.load(heldout=1)
    with pytest.raises(UserError, match="max_bytes"):
        stdlib.load(max_bytes=0)
    with pytest.raises(UserError, match="No Python sources"):
        stdlib.load(root=tmp_path)
