"""The load test passes on the real engine in small and detects a server that errs."""

import asyncio
import gc

import pytest

from benchmarks import serve_load
from benchmarks.serve_requests import make_requests
from qwen_jax.generate.answer import Answer, AnswerState
from qwen_jax.generate.load import load
from qwen_jax.server.completion_job import CompletionJob
from qwen_jax.server.config import ServerLimits, served_model
from tests.generate.fake_engine import FakeEngine, default_answer
from tests.server.serving import serve, serve_service


def run_load(server, requests, expected, **sizes):
    """Returns the `LoadResult` of a load on a server under test."""
    return asyncio.run(serve_load.run_load(server.url, requests, expected, seed=1, **sizes))


@pytest.mark.slow
def test_the_real_engine_passes_the_load_test(tmp_path):
    """300 requests from 24 clients, some cancelled, some invalid; nothing leaks."""
    folder = serve_load.make_model(tmp_path / "tiny")
    sizes = {
        "max_running_requests": 4,
        "max_length": 512,
        "page_size": 32,
        "prefill_tokens": 32,
        "pages": 48,
    }
    with load(folder, warm_up=False, max_waiting=20, **sizes) as qwen:
        model = served_model(qwen, "tiny", created=1)
        with serve_service(qwen.service, model, ServerLimits()) as server:
            requests = make_requests("tiny", 24, seed=0)
            expected = asyncio.run(serve_load.run_alone(server.url, requests))
            assert len({choices[0] for choices in expected}) > 12
            result = run_load(server, requests, expected, total=300, clients=24)
            assert result.wrong == []
            assert sum(result.counts.values()) == 300
            assert set(result.counts) == set(serve_load.KINDS)
            metrics = serve_load.wait_until_idle(server.url)
            assert serve_load.find_leaks(metrics) == []
            assert metrics['qwen_requests_ended_total{finish="cancelled"}'] > 0
            assert server.state.gate.active == 0
            gc.collect()
            kept = [
                x for x in gc.get_objects() if isinstance(x, Answer | AnswerState | CompletionJob)
            ]
            assert kept == []


def test_wrong_responses_are_detected():
    """A server whose responses depend on earlier requests is told apart from a correct one."""
    count = iter(range(10**6))

    def drifting(request):
        if next(count) > 30:
            yield 65
        yield from default_answer(request)

    requests = make_requests("toy", 12, seed=0)
    for script, correct in ((default_answer, True), (drifting, False)):
        engine = FakeEngine(script, rows=4, max_length=4000)
        with serve(engine) as server:
            expected = asyncio.run(serve_load.run_alone(server.url, requests))
            result = run_load(server, requests, expected, total=60, clients=8)
            if correct:
                assert result.wrong == []
                assert serve_load.find_leaks(serve_load.wait_until_idle(server.url)) == []
            else:
                assert any("is not" in entry or "does not begin" in entry for entry in result.wrong)


def test_requests_left_after_the_load_are_detected():
    engine = FakeEngine()
    engine.hold()
    with serve(engine) as server:
        answer = server.service.submit([1, 2, 3])
        server.wait_until(lambda: server.service.stats().waiting == 1)
        wrong = serve_load.find_leaks(serve_load.wait_until_idle(server.url, 0.1))
        assert wrong == [
            "qwen_requests_waiting is 1 after the load",
            "1 submitted, 0 ended",
        ]
        answer.cancel()
