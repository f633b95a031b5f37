"""The load benchmark: on the real engine in small, and what it says of a server that errs."""

import asyncio
import gc

import pytest

from benchmarks import serve_load
from qwen_jax.generate.answer import Answer, Job
from qwen_jax.generate.load import load
from qwen_jax.server.completion_job import CompletionJob
from qwen_jax.server.config import ServerLimits, served_model
from tests.generate.fake_engine import FakeEngine, default_answer
from tests.server.serving import serve, serve_service


def drive(server, made, expected, **sizes):
    return asyncio.run(serve_load.run_load(server.url, made, expected, seed=1, **sizes))


@pytest.mark.slow
def test_the_real_engine_loses_and_mixes_nothing(tmp_path):
    """300 requests from 24 clients, some given up, some bad; nothing is left over."""
    folder = serve_load.make_model(tmp_path / "tiny")
    sizes = {"rows": 4, "max_length": 512, "page_size": 32, "prefill_tokens": 32, "pages": 48}
    with load(folder, warm_up=False, max_waiting=20, **sizes) as qwen:
        model = served_model(qwen, "tiny", created=1)
        with serve_service(qwen.service, model, ServerLimits()) as server:
            made = serve_load.asks("tiny", 24, seed=0)
            expected = asyncio.run(serve_load.alone(server.url, made))
            assert len({told[0] for told in expected}) > 12
            load_ = drive(server, made, expected, requests=300, clients=24)
            assert load_.wrong == []
            assert sum(load_.counts.values()) == 300 and set(load_.counts) == set(serve_load.KINDS)
            found = serve_load.settled(server.url)
            assert serve_load.left_over(found) == []
            assert found['qwen_requests_ended_total{finish="cancelled"}'] > 0
            assert server.state.gate.active == 0
            gc.collect()
            kept = [x for x in gc.get_objects() if isinstance(x, Answer | Job | CompletionJob)]
            assert kept == []


def test_wrong_answers_are_found():
    """A server whose answers depend on how many came before is told apart from a right one."""
    engine = FakeEngine(rows=4)
    count = iter(range(10**6))

    def drifting(request):
        if next(count) > 30:
            yield 65
        yield from default_answer(request)

    made = serve_load.asks("toy", 12, seed=0)
    for script, right in ((default_answer, True), (drifting, False)):
        engine = FakeEngine(script, rows=4, max_length=4000)
        with serve(engine) as server:
            expected = asyncio.run(serve_load.alone(server.url, made))
            found = drive(server, made, expected, requests=60, clients=8)
            if right:
                assert found.wrong == []
                assert serve_load.left_over(serve_load.settled(server.url)) == []
            else:
                assert any("is not" in entry or "does not begin" in entry for entry in found.wrong)


def test_what_is_left_over_is_found():
    engine = FakeEngine()
    engine.hold()
    with serve(engine) as server:
        answer = server.service.submit([1, 2, 3])
        server.wait_until(lambda: server.service.stats().waiting == 1)
        wrong = serve_load.left_over(serve_load.settled(server.url, 0.1))
        assert wrong == [
            "qwen_requests_waiting is 1 after the load",
            "1 submitted, 0 ended",
        ]
        answer.cancel()
