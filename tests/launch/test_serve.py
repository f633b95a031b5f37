"""`launch.serve` as a process: start, requests, drain on SIGTERM, and invalid flags."""

import contextlib
import re
import signal
import socket
import threading
import time

import httpx
import openai
import pytest

from tests import programs
from tests.generate import tiny

SIZES = [
    "--max_running_requests=2",
    "--max_length=128",
    "--page_size=16",
    "--prefill_tokens=64",
    "--cpu_devices=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny-chat")


@contextlib.contextmanager
def start(folder, log, *flags):
    """Yields the process, the model name and the URL of a server; kills it at the end."""
    flags = [f"--model={folder}", "--port=0", "--nowarm_up", *SIZES, *flags]
    process = programs.start("launch.serve", flags, log)
    try:
        end = time.monotonic() + 120
        while not (found := re.search(r"^serving (\S+) at (\S+)$", log.read_text(), re.M)):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.1)
        yield process, *found.groups()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_server_answers_with_api_keys_and_drains_on_sigterm(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_JAX_API_KEYS", "first-key-1, second-key-2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    log = tmp_path / "log"
    with start(folder, log, "--name=tiny", "--api_key=third-key-3") as (process, name, url):
        assert name == "tiny"
        for key in ("first-key-1", "second-key-2", "third-key-3"):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
            assert [m.id for m in client.models.list()] == ["tiny"]
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/", headers={"host": "evil.example"}).status_code == 403
        hello = [{"role": "user", "content": "hello"}]
        answers = [
            client.chat.completions.create(model="tiny", messages=hello, seed=5, max_tokens=8)
            for _ in range(2)
        ]
        texts = [answer.choices[0].message.content for answer in answers]
        assert texts[0] == texts[1] and answers[0].usage.completion_tokens == 8
        # A running answer finishes after SIGTERM, and the process exits cleanly.
        seen = {}

        def read_stream():
            extra = {"ignore_eos": True}
            stream = client.chat.completions.create(
                model="tiny", messages=hello, max_tokens=60, stream=True, extra_body=extra
            )
            for event in stream:
                seen.setdefault("first_event", time.monotonic())
                seen["finish"] = event.choices[0].finish_reason

        thread = threading.Thread(target=read_stream)
        thread.start()
        while "first_event" not in seen:
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert seen["finish"] == "length"
        assert process.wait(30) == 0
    text = log.read_text()
    assert "\nended\n" in text and "Traceback" not in text
    assert "hello" not in text and "-key-" not in text


@pytest.mark.slow
def test_invalid_flags_exit_with_one_sentence_and_status_2(folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = programs.run(
            [
                ["launch.serve", f"--model={folder}", f"--port={port}", *SIZES],
                ["launch.serve", f"--model={tmp_path}/none", "--port=0", *SIZES],
                ["launch.serve", f"--model={folder}", "--port=0", "--api_key=short"],
                ["launch.serve", f"--model={folder}", "--port=0", "--drain=-1"],
                ["launch.serve", "--port=0"],
                ["launch.serve", f"--model={folder}", "--port=99999"],
            ]
        )
    words = (
        f"cannot listen on 127.0.0.1:{port}",
        "does not exist",
        "API key",
        "drain_s",
        "model",
        "port",
    )
    for one, expected in zip(done, words, strict=True):
        assert one.status == 2 and expected in one.last_line, one.output[-500:]
        assert "Traceback" not in one.output
