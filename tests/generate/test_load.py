"""Loading and generating: every kind of model folder, ids equal to the reference, bad input."""

import dataclasses
import io
import json
import shutil
import threading
import time

import jax
import numpy as np
import pytest

import qwen_jax
from qwen_jax import load
from qwen_jax.chat.chatml import build_context
from qwen_jax.errors import UserError
from qwen_jax.generate.dense_sampler import sample
from qwen_jax.generate.handle import Qwen
from qwen_jax.generate.load import with_layer_windows
from qwen_jax.generate.source import find_model, load_weights
from qwen_jax.generate.status_line import StatusLine, forward_log
from qwen_jax.model import ForwardOptions
from qwen_jax.model.quantised import weight_bytes
from qwen_jax.progress import Progress
from qwen_jax.train.checkpoint import Checkpoints
from tests.generate import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Working folder of a training run: checkpoints, and the vocabulary beside them."""
    place = tmp_path_factory.mktemp("runs") / "demo"
    fingerprint = {
        "model": dataclasses.asdict(tiny.CONFIG),
        "tokenizer_sha256": tiny.TOKENIZER.sha256,
    }
    options = {"keep_last": 2, "keep_every": None, "fingerprint": fingerprint}
    with Checkpoints(str(place / "checkpoints"), **options) as checkpoints:
        zeros = jax.tree.map(lambda x: 0 * x, tiny.params())
        checkpoints.save(1, {"params": zeros}, {}, wait=True)
        checkpoints.save(2, {"params": tiny.params()}, {}, wait=True)
    tiny.TOKENIZER.save(place / "tokenizer.tiktoken")
    return place


@pytest.fixture(scope="module")
def qwen(folder):
    with load(folder, warm_up=False, **tiny.ENGINE) as loaded:
        yield loaded


def greedy(prompt, n, params=None, config=tiny.CONFIG):
    """Returns `n` greedily decoded ids of the dense sampler, by default of the tiny model."""
    return sample(
        params or tiny.params(),
        [list(prompt)],
        config,
        ForwardOptions(dtype="float32"),
        max_new_tokens=n,
        vocab_size=tiny.TOKENIZER.vocab_size,
    )[0]


def test_greedy_ids_equal_those_of_the_dense_sampler(qwen):
    """Also with dynamic NTK, which applies beyond the trained length of 256 tokens."""
    for length in (5, 300):
        prompt = np.random.default_rng(length).integers(0, 256, length).tolist()
        answer = qwen.submit(
            prompt, temperature=0.0, repetition_penalty=1.0, stop_ids=(), max_tokens=24
        )
        assert answer.result().tokens.tolist() == greedy(prompt, 24)


def test_layer_windows_apply_past_the_trained_length(folder):
    """Both layers of the model have windows of 256 tokens; the prompt has 300."""
    prompt = np.random.default_rng(300).integers(0, 256, 300).tolist()
    windowed = dataclasses.replace(tiny.CONFIG, windows=(256, 256))
    with load(folder, warm_up=False, layer_windows=True, **tiny.ENGINE) as loaded:
        answer = loaded.submit(
            prompt, temperature=0.0, repetition_penalty=1.0, stop_ids=(), max_tokens=24
        )
        assert answer.result().tokens.tolist() == greedy(prompt, 24, config=windowed)
    assert greedy(prompt, 24, config=windowed) != greedy(prompt, 24)
    source = find_model(folder)
    without = dataclasses.replace(
        source, config=dataclasses.replace(tiny.CONFIG, dynamic_ntk=False)
    )
    with pytest.raises(UserError, match="apply only to models of Qwen v1 with dynamic NTK"):
        with_layer_windows(without)


def test_chat_prompts_have_the_format_of_the_release(qwen):
    qwen.reset()
    options = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 12, "stop_ids": ()}
    said = qwen.chat("你好", **options)
    context = build_context("你好", [], "You are a helpful assistant.", tiny.TOKENIZER, 600)
    want = tiny.TOKENIZER.decode(greedy(context, 12), skip_special_tokens=True).strip()
    assert said == want and qwen.history == [("你好", said)]
    pieces = list(qwen.stream("more", **options))
    context = build_context("more", [("你好", said)], qwen.system, tiny.TOKENIZER, 600)
    want = tiny.TOKENIZER.decode(greedy(context, 12), skip_special_tokens=True)
    assert "".join(pieces) == want and len(qwen.history) == 2


def test_options_override_the_defaults_of_the_folder(qwen):
    params = qwen.defaults.params
    assert (params.top_p, params.repetition_penalty, params.max_tokens) == (0.8, 1.1, 40)
    answers = [qwen.generate("ab", seed=5) for _ in range(2)]
    assert answers[0] == answers[1] != qwen.generate("ab", seed=6)
    several = qwen.generate(["ab", "cd", "ab"], seed=5, max_tokens=8)
    assert several[0] == several[2] == qwen.generate("ab", seed=5, max_tokens=8)
    result = qwen.submit("ab", logprobs=2, max_tokens=4, stop_ids=()).result()
    assert result.top_ids.shape == (4, 2) and np.all(result.logprobs <= 0)
    with pytest.raises(UserError, match="did you mean 'top_k'"):
        qwen.generate("ab", topk=3)
    with pytest.raises(UserError, match="empty"):
        qwen.generate("")


def test_abandoned_stream_is_cancelled(qwen):
    qwen.reset()
    for _ in qwen.stream("go on", max_tokens=400, stop_ids=()):
        break
    assert qwen.history == []
    assert qwen.generate("ab", max_tokens=2) is not None  # the engine is available again
    assert qwen.service.stats().running == 0


def test_working_folder_checkpoints_and_step_folder_give_the_same_model(workdir, folder):
    reference = load_weights(find_model(folder), "float32")
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "step_00000002"):
        source = find_model(path)
        assert (source.step, source.defaults.chat_format) == (2, "raw")
        assert source.config == tiny.CONFIG and source.tokenizer.sha256 == tiny.TOKENIZER.sha256
        jax.tree.map(np.testing.assert_array_equal, load_weights(source, "float32"), reference)
    first = find_model(workdir, step=1)
    half = load_weights(first, "bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(half)} == {"bfloat16"}
    assert not any(np.any(x) for x in jax.tree.leaves(half) if x.ndim > 2)


def test_base_model_continues_text_without_history(workdir, qwen):
    """The same weights, with the defaults of a training run's folder."""
    base = Qwen(qwen.service, tiny.CONFIG, find_model(workdir).defaults, "demo")
    assert "base model" in repr(base) and "chat model" in repr(qwen)
    said = base.chat("def f(", temperature=0.0, max_tokens=8)
    ids = greedy(tiny.TOKENIZER.encode("def f("), 8)
    assert said == tiny.TOKENIZER.decode(ids) and base.history == []


def test_concurrent_requests_do_not_change_an_answer(qwen):
    """48 requests from 4 threads on 2 rows, some stopped, cancelled or garbage-collected."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, int(n)).tolist() for n in rng.integers(1, 90, 12)]
    how = (tiny.params(), prompts, tiny.CONFIG, ForwardOptions(dtype="float32"))
    alone = sample(*how, max_new_tokens=20, vocab_size=tiny.TOKENIZER.vocab_size)
    wrong = []

    def client(k):
        for i, (prompt, ids) in enumerate(zip(prompts, alone, strict=True)):
            text = tiny.TOKENIZER.decode(ids)
            stop = [text[8:10]] if (i + k) % 3 == 0 else []
            answer = qwen.submit(
                prompt,
                temperature=0.0,
                repetition_penalty=1.0,
                max_tokens=20,
                stop=stop,
                stream=(i + k) % 2 == 0,
            )
            if (i + k) % 5 == 0:
                answer.cancel()
            elif (i + k) % 5 != 1:  # otherwise the answer is not read
                got = answer.result(timeout=120)
                want = text[: text.find(stop[0])] if stop else text
                if got.text != want or got.tokens.tolist() != ids[: len(got.tokens)]:
                    wrong.append((i, stop, got, want))

    threads = [threading.Thread(target=client, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    while qwen.service.stats().running:  # until unread requests are cancelled
        time.sleep(0.01)
    stats = qwen.service.stats().engine
    assert stats.pages_free == stats.pages_total and stats.waiting == 0


@pytest.mark.slow
def test_weights_can_be_quantised_while_loading(folder, workdir):
    """Both kinds of folder give the same weights, and the engine runs on them."""
    source = find_model(folder)
    quantised = load_weights(source, "float32", "int8")
    assert weight_bytes(quantised["layers"]) < 0.4 * weight_bytes(tiny.params()["layers"])
    from_training = load_weights(find_model(workdir), "float32", "int8")
    jax.tree.map(np.testing.assert_array_equal, from_training, quantised)
    with load(folder, weights="int8", warm_up=False, **tiny.ENGINE) as qwen:
        prompt = list(b"some text")
        answer = qwen.submit(prompt, temperature=0.0, repetition_penalty=1.0, max_tokens=16)
        assert answer.result().tokens.tolist() == greedy(prompt, 16, quantised)


@pytest.mark.slow
def test_two_devices_give_the_same_text(folder, qwen):
    with load(folder, tensor=2, warm_up=False, **tiny.ENGINE) as shared:
        options = {"temperature": 0.0, "max_tokens": 16, "stop_ids": ()}
        assert shared.generate("abc", **options) == qwen.generate("abc", **options)


def test_status_line_is_written_to_terminals_only():
    class Screen(io.StringIO):
        def isatty(self):
            return True

    shown, hidden = Screen(), io.StringIO()
    for stream in (shown, hidden):
        with StatusLine(stream) as status, forward_log(status.show):
            status.show("reading a model")
            Progress("load", 100, "B", every=0.0).add(50)
    text = shown.getvalue()
    assert "\rreading a model (0 s)" in text and "load: 5e-05 MB of 0.0001 MB (50 %)" in text
    assert text.endswith("\r") and "\n" not in text and not text.split("\r")[-2].strip()
    assert hidden.getvalue() == ""


def test_bad_input_is_refused(folder, workdir, tmp_path):
    def refused(match, path=folder, **options):
        with pytest.raises(UserError, match=match):
            load(path, **options)

    refused("does not exist; give a Hugging Face", tmp_path / "nothing")
    refused("is a file", folder / "config.json")
    refused("neither config.json", tmp_path)
    refused("has no steps", step=3)
    refused("has no checkpoint of step 7", workdir, step=7)
    refused("not step 1", workdir / "checkpoints" / "step_00000002", step=1)
    refused("did you mean 'float32'", dtype="float")
    refused("did you mean 'pages'", page=3)
    refused("did you mean 'int8'", weights="in8")
    refused("quantised on one device only", workdir, weights="int8", tensor=2)
    refused("tensor is 3; it must divide the 4 kv heads", tensor=3)
    refused("tensor is 16", tensor=16)
    refused("chat_format is 'chat'", chat_format="chat")
    no_vocabulary = shutil.copytree(
        folder, tmp_path / "no_vocabulary", ignore=shutil.ignore_patterns("*.tiktoken")
    )
    refused(r"There is no vocabulary in .*no_vocabulary; name one", no_vocabulary)
    assert (
        find_model(no_vocabulary, tokenizer=folder / "qwen.tiktoken").defaults.chat_format
        == "chatml"
    )
    from qwen_jax.tokenizer import Tokenizer

    other = tmp_path / "other.tiktoken"
    Tokenizer((*(bytes([i]) for i in range(256)), b"ab")).save(other)
    refused("not the vocabulary that .* was trained with", workdir, tokenizer=other)
    config = json.loads((folder / "config.json").read_text())
    (no_vocabulary / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    refused("256 ranks, but the model", no_vocabulary, tokenizer=folder / "qwen.tiktoken")


def test_package_exports_load_and_raises_for_unknown_names():
    assert qwen_jax.load is load
    with pytest.raises(AttributeError, match="laod"):
        _ = qwen_jax.laod
