"""Service: each reader receives its complete answer, whatever other readers and requests do."""

import asyncio
import gc
import itertools
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from qwen_jax.engine.request import SamplingParams
from qwen_jax.errors import UserError
from qwen_jax.generate.service import EngineFailed, Overloaded, Service, ServiceClosed
from qwen_jax.tokenizer import Tokenizer
from tests.generate.fake_engine import FakeEngine, default_answer, logprob_of

TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))
HELLO = list(b"say hello|")


def spell(text, rest=()):
    """Returns a script that answers each request with the bytes of `text`, then ids `rest`."""
    return lambda request: iter([*text.encode(), *rest])


@pytest.fixture
def run():
    """Creates services; at the end closes them and checks that their threads have ended."""
    made = []

    def start(engine, **options):
        made.append(Service(engine, TOKENIZER, **options))
        return made[-1]

    yield start
    for service in made:
        service.close()
        assert not service._engine_thread._thread.is_alive()


def expected(prompt, n):
    """Returns the first `n` ids that `FakeEngine` generates for a prompt."""
    ids = default_answer(type("R", (), {"prompt": tuple(prompt)}))
    return [next(ids) for _ in range(n)]


@pytest.mark.parametrize("stream", [False, True])
def test_answer_is_the_text_of_the_engines_ids(run, stream):
    service = run(FakeEngine(spell("你好, world!")))
    chunks = list(service.submit(HELLO, SamplingParams(max_tokens=100), stream=stream))
    assert "".join(chunk.text for chunk in chunks) == "你好, world!"
    assert (
        np.concatenate([chunk.tokens for chunk in chunks]).tobytes().replace(b"\0", b"").decode()
        == "你好, world!"
    )
    assert [chunk.finish for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    if stream:  # one character per chunk, then the end
        assert [chunk.text for chunk in chunks[:3]] == ["你", "好", ","]
        assert [len(chunk.tokens) for chunk in chunks[:3]] == [3, 3, 1]
    else:
        assert len(chunks) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_answer_and_cancels_the_request_in_the_engine(run, stream):
    engine = FakeEngine(spell("one\n\ntwo" * 50))
    service = run(engine)
    answer = service.submit(
        HELLO, SamplingParams(max_tokens=200, logprobs=2), stop=["\n\n", "zzz"], stream=stream
    )
    result = answer.result()
    assert (result.text, result.finish, result.stop) == ("one", "stop", "\n\n")
    # Tokens and log-probabilities end before the stop string.
    assert result.tokens.tolist() == list(b"one")
    np.testing.assert_array_equal(result.logprobs, np.float32([logprob_of(t) for t in b"one"]))
    assert result.top_ids.shape == result.top_logprobs.shape == (3, 2)
    np.testing.assert_array_equal(result.raw_logprobs, result.logprobs - 1)
    until(lambda: engine.cancelled == [answer.id])
    assert answer.new_tokens < 10 and answer.prompt_tokens == len(HELLO)
    assert answer.cached_tokens == 2


def test_held_back_text_is_returned_at_the_end(run):
    service = run(FakeEngine(spell("hello\nUs")))
    answer = service.submit(HELLO, SamplingParams(max_tokens=50), stop=["\nUser"], stream=True)
    chunks = list(answer)
    assert [c.text for c in chunks] == [*"hello", "\nUs"]
    assert chunks[-1].finish == "stop" and chunks[-1].stop is None
    assert chunks[-1].tokens.tolist() == list(b"\nUs")


def test_bad_input_is_refused_by_submit_or_by_the_first_read(run):
    service = run(FakeEngine(max_length=16))
    with pytest.raises(UserError, match="no tokens"):
        service.submit([])
    with pytest.raises(UserError, match=r"16 tokens.*16; shorten"):
        service.submit([1] * 16)
    with pytest.raises(UserError, match="stop"):
        service.submit([1], stop="text")
    with pytest.raises(UserError, match="max_waiting"):
        Service(FakeEngine(), TOKENIZER, max_waiting=0)
    # Errors that only the engine detects are raised to the reader of that request alone.
    good = service.submit([1, 2], SamplingParams(max_tokens=4))
    bad = service.submit([1_000_000])
    for _ in range(2):
        with pytest.raises(UserError, match="not in the vocabulary"):
            bad.result()
    assert good.result().tokens.tolist() == expected([1, 2], 4)
    assert service.stats().finished["refused"] == 1


def test_requests_are_refused_while_the_queue_is_full(run):
    engine = FakeEngine(rows=1)
    engine.hold()
    service = run(engine, max_waiting=3)
    answers = [service.submit([i + 1], SamplingParams(max_tokens=2)) for i in range(3)]
    with pytest.raises(Overloaded) as refused:
        service.submit([9])
    assert refused.value.waiting == 3 and 1 <= refused.value.retry_after <= 60
    stats = service.stats()
    assert (stats.submitted, stats.refused, stats.waiting) == (3, 1, 3)
    answers[1].cancel()
    until(lambda: service.stats().waiting == 2)
    answers.append(service.submit([4], SamplingParams(max_tokens=2)))
    engine.release()
    assert [a.result().finish for a in answers] == ["length", "cancelled", "length", "length"]


def test_cancel_from_another_thread_ends_the_answer_with_the_remaining_text(run):
    endless = itertools.repeat(ord("."))
    engine = FakeEngine(lambda request: itertools.chain(b"abc", endless), max_length=10**9)
    service = run(engine)
    answer = service.submit([1], SamplingParams(max_tokens=10**8), stop=["..never"], stream=True)
    text = [next(answer).text for _ in range(3)]
    timer = threading.Timer(0.02, answer.cancel)
    timer.start()
    rest = answer.result(timeout=10)
    assert "".join(text) == "abc" and rest.finish == "cancelled"
    assert set(rest.text) <= {"."} and len(rest.tokens) == len(rest.text)
    until(lambda: not engine.busy)
    assert engine.cancelled == [answer.id]
    answer.cancel()  # a second time, after the end: no effect
    assert list(answer) == []


def test_engine_failure_is_raised_to_all_readers_and_later_submissions(run):
    engine = FakeEngine()
    engine.hold()
    service = run(engine)
    answers = [service.submit([i + 1]) for i in range(4)]
    raised = []

    def read(answer):
        try:
            answer.result(timeout=10)
        except EngineFailed as error:
            raised.append(error.__cause__)

    readers = [threading.Thread(target=read, args=(a,)) for a in answers]
    for reader in readers:
        reader.start()
    cause = ZeroDivisionError("boom")
    engine.fail(cause)
    for reader in readers:
        reader.join(10)
    assert raised == [cause] * 4
    with pytest.raises(EngineFailed, match="boom"):
        service.submit([1])
    assert service.failed is cause and service.stats().finished["failed"] == 4


def test_engine_that_drops_a_request_counts_as_failed(run):
    class Dropping(FakeEngine):
        def step(self):
            self._waiting.clear()
            return []

    answer = run(Dropping()).submit([1])
    with pytest.raises(EngineFailed, match="idle with 1 requests"):
        answer.result(timeout=10)


def test_failure_while_adding_a_request_ends_all_queued_requests(run):
    class Refusing(FakeEngine):
        def add(self, request):
            raise MemoryError("no pages")

    engine = Refusing()
    service = run(engine)
    with service._engine_thread._wake:  # all three are received in the same iteration
        answers = [service.submit([i + 1]) for i in range(3)]
    for answer in answers:
        with pytest.raises(EngineFailed, match="no pages"):
            answer.result(timeout=10)


def test_async_readers_in_one_event_loop_get_their_own_answers(run):
    engine = FakeEngine(rows=3)
    service = run(engine)

    async def read(prompt, cancel_after=None):
        answer = service.submit(prompt, SamplingParams(max_tokens=40), stream=True)
        tokens = []
        async for chunk in answer:
            tokens += chunk.tokens.tolist()
            if cancel_after is not None and len(tokens) >= cancel_after:
                answer.cancel()
                cancel_after = None
            last = chunk
        return tokens, last.finish

    async def read_all():
        return await asyncio.gather(*(read([i, 7], 5 if i % 3 == 0 else None) for i in range(30)))

    for i, (tokens, finish) in enumerate(asyncio.run(read_all())):
        want = expected([i, 7], 40)
        assert tokens == want[: len(tokens)]
        assert finish in (("cancelled", "length") if i % 3 == 0 else ("length",))
        assert len(tokens) == 40 or finish == "cancelled"
    until(lambda: not engine.busy)
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads


def test_cancelled_task_and_closed_loop_leave_no_waiters(run):
    engine = FakeEngine()
    engine.hold()
    service = run(engine)

    async def give_up():
        async with service.submit([1]) as answer:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(answer.aresult(), 0.05)
            assert not answer._state.waiters
        # Another reader is waiting when its loop ends.
        other = service.submit([2])
        task = asyncio.ensure_future(other.aresult())
        await asyncio.sleep(0.01)
        task.cancel()
        return other

    other = asyncio.run(give_up())
    engine.release()
    assert other.result(timeout=10).finish == "length"
    assert [r.prompt for r in engine.added if r.id in engine.cancelled] == [(1,)]


def test_slow_reader_does_not_delay_other_answers(run):
    service = run(FakeEngine(rows=2))
    slow = service.submit([1], SamplingParams(max_tokens=100), stream=True)
    next(slow)
    fast = [service.submit([i + 2], SamplingParams(max_tokens=100), stream=True) for i in range(9)]
    for i, answer in enumerate(fast):
        assert answer.result(timeout=10).tokens.tolist() == expected([i + 2], 100)
    assert 90 <= len(slow.result(timeout=10).tokens) <= 99


def test_garbage_collected_answer_is_cancelled(run):
    engine = FakeEngine(max_length=10**9)
    service = run(engine)
    for chunk in service.submit([1], SamplingParams(max_tokens=10**8), stream=True):
        if chunk.text:
            break
    until(lambda: not engine.busy)
    assert service.stats().finished["cancelled"] == 1
    engine.hold()
    answer = service.submit([2])
    del answer
    until(lambda: service.stats().finished["cancelled"] == 2)


@pytest.mark.parametrize("drain", [True, False])
def test_close_drains_or_cancels(drain):
    engine = FakeEngine(rows=1)
    engine.hold()
    service = Service(engine, TOKENIZER)
    answers = [service.submit([i + 1], SamplingParams(max_tokens=4)) for i in range(5)]
    closing = threading.Thread(target=service.close, kwargs={"drain": drain})
    closing.start()
    until(lambda: not service._engine_thread._accepting)
    with pytest.raises(ServiceClosed):
        service.submit([1])
    engine.release()
    closing.join(10)
    assert {a.result(timeout=10).finish for a in answers} == {"length" if drain else "cancelled"}
    assert not service._engine_thread._thread.is_alive() and not engine.busy
    service.close()


def test_draining_stops_after_its_timeout():
    engine = FakeEngine()
    engine.hold()
    service = Service(engine, TOKENIZER)
    answer = service.submit([1])
    started = time.monotonic()
    service.close(drain=True, timeout=0.1)
    assert time.monotonic() - started < 5
    assert answer.result(timeout=10).finish == "cancelled" and not engine.busy


def test_thousands_of_requests_are_answered_and_leave_no_state(run):
    """2,000 requests from 8 threads, a third of them cancelled or garbage-collected."""
    engine = FakeEngine(rows=16)
    service = run(engine)
    wrong, jobs = [], weakref.WeakSet()

    def client(k):
        rng = np.random.default_rng(k)
        for i in range(250):
            prompt = [k, i % 250, 3]
            try:
                answer = service.submit(
                    prompt, SamplingParams(max_tokens=12), stream=bool(rng.integers(2))
                )
            except Overloaded:
                continue
            jobs.add(answer._state)
            kind = rng.integers(6)
            if kind == 0:
                answer.cancel()
            if kind == 1:
                continue
            tokens = answer.result(timeout=60).tokens.tolist()
            want = expected(prompt, 12)
            if tokens != want[: len(tokens)] or (kind > 1 and len(tokens) != 12):
                wrong.append((prompt, tokens))

    threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    until(lambda: not engine.busy and not service._engine_thread._answers)
    stats = service.stats()
    assert stats.submitted == 2000 == sum(stats.finished.values())
    assert stats.finished["length"] >= 1200 and stats.finished["cancelled"] > 100
    gc.collect()
    until(lambda: len(jobs) == 0)
    assert not service._engine_thread._cancelled and not service._engine_thread.abandoned


def test_idle_service_uses_no_cpu_and_ends_when_garbage_collected(run):
    engine = FakeEngine()
    service = Service(engine, TOKENIZER)
    service.submit([1], SamplingParams(max_tokens=3)).result()
    thread = service._engine_thread._thread
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    # While the engine holds a request back, it is polled, but not continuously.
    engine.hold()
    answer = service.submit([2])
    steps, real = 0, engine.step

    def counted():
        nonlocal steps
        steps += 1
        return real()

    engine.step = counted
    time.sleep(0.2)
    assert 1 <= steps < 1000
    del answer, service
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_statistics_count_requests_tokens_and_times(run):
    service = run(FakeEngine(rows=2))
    for i in range(6):
        service.submit([i + 1, 2], SamplingParams(max_tokens=5), stream=i % 2 == 0).result()
    until(lambda: sum(service.stats().finished.values()) == 6)
    stats = service.stats()
    assert stats.finished["length"] == 6 and stats.new_tokens == 30
    assert (stats.prompt_tokens, stats.cached_tokens) == (12, 12)
    for measured in (stats.first_token, stats.per_token, stats.request):
        assert measured.count == 6 and len(measured.counts) == len(measured.bounds) + 1
        assert 0 < measured.total < 60
    assert stats.request.total >= stats.first_token.total
    assert stats.engine.new_tokens == 30


def until(condition, timeout=10.0):
    """Waits until `condition()` holds because of another thread."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "condition not met in time"
        time.sleep(0.002)


def test_process_exits_while_a_service_is_running():
    import subprocess

    program = (
        "from qwen_jax.generate.service import Service; from qwen_jax.tokenizer import Tokenizer\n"
        "from tests.generate.fake_engine import FakeEngine\n"
        "from qwen_jax.engine.request import SamplingParams\n"
        "s = Service(FakeEngine(max_length=10**9), Tokenizer([bytes([i]) for i in range(256)]))\n"
        "a = s.submit([1], SamplingParams(max_tokens=10**8), stream=True); next(a); print('up')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "up\n", "")
