"""The conversation loop of launch.chat without a terminal: commands, settings, bad input."""

import io
import json
import threading

import pytest

from launch.repl import COMMANDS, Repl
from launch.terminal import PipeReader
from qwen_jax.engine.request import SamplingParams
from qwen_jax.generate.generation_config import GenerationDefaults
from qwen_jax.generate.service import Service
from qwen_jax.generate.session import Session
from qwen_jax.tokenizer import Tokenizer
from tests.generate.fake_engine import FakeEngine

TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))


class Conversation:
    """A conversation with a fake engine that answers " <N>: <query> <seed>"."""

    def __init__(self, chat_format="chatml", script=None, **defaults):
        self.asked = []
        self.engine = FakeEngine(script or self._answer, max_length=10_000)
        self.service = Service(self.engine, TOKENIZER)
        params = SamplingParams(max_tokens=500, top_p=0.8)
        self.session = Session(self.service, GenerationDefaults(chat_format, params, **defaults))
        self.interrupt_at = None

    def _answer(self, request):
        said = TOKENIZER.decode(request.prompt).rpartition("user\n")[2].partition("<|im")[0]
        self.asked.append((said, request))
        return iter(f" {len(self.asked)}: {said} {request.params.seed}".encode())

    def run(self, *lines, **options):
        """Runs a loop on these input lines and returns what it prints."""
        out = io.StringIO()
        source = PipeReader(io.StringIO("".join(line + "\n" for line in lines)))
        given = {"description": "a model", "seed": 1234, "colour": False} | options
        self.repl = Repl(self.session, reader=source, out=out, **given)
        self.repl.run()
        return out.getvalue()


@pytest.fixture
def make():
    conversations = []

    def start(*args, **kwargs):
        conversations.append(Conversation(*args, **kwargs))
        return conversations[-1]

    yield start
    for talk in conversations:
        talk.service.close()


def test_answers_are_printed_with_their_speed(make):
    talk = make()
    out = talk.run("hi there", "你好").splitlines()
    assert out[0] == "1: hi there 1234" and out[2] == "2: 你好 1234"
    assert out[1].startswith("17 tokens, ") and "tokens/s, first after 0." in out[1]
    assert talk.session.history == [("hi there", "1: hi there 1234"), ("你好", "2: 你好 1234")]


def test_lines_between_triple_quotes_are_one_message(make):
    talk = make()
    talk.run('"""', "/one", "", '"two"', '"""', "three")
    assert [said for said, _ in talk.session.history] == ['/one\n\n"two"', "three"]


def test_help_lists_every_command_and_both_prefixes_work(make):
    out = make().run("/help", ":h")
    for command in COMMANDS:
        assert out.count(f"  {command.usage} ") == 2
    names = [name for command in COMMANDS for name in command.names]
    assert len(names) == len(set(names))
    # The names in the release's cli_demo.py.
    assert {"help", "h", "exit", "quit", "q", "clear", "cl", "clear-his", "clh"} <= set(names)
    assert {"history", "his", "seed", "conf", "reset-conf"} <= set(names)


def test_settings_are_sent_to_the_engine_and_can_be_reset(make):
    talk = make()
    out = talk.run(
        "/set temperature 0.5", ":conf top_k=40", ":conf max_new_tokens=9", "/set stop [\"z\"]",
        "/seed 7", "one", "/set", "/reset", "two", "/show",
    )  # fmt: skip
    first, second = (request.params for _, request in talk.asked)
    assert (first.temperature, first.top_k, first.max_tokens, first.seed) == (0.5, 40, 9, 7)
    assert (second.temperature, second.top_k, second.max_tokens, second.seed) == (1.0, 0, 500, 1234)
    assert "max_tokens = 9 (was 500)" in out and 'stop = ["z"]' in out and "a model" in out
    assert "cut at max_tokens" in out


def test_thinking_is_a_setting_if_the_template_reads_it(make):
    template = (
        "<|im_start|>user\n{{ messages[-1].content }}<|im_end|>\n<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    )
    talk = make(template=template)
    out = talk.run("one", "/set thinking off", "two", "/show", "/set thinking maybe", "/reset", "x")
    ends = [TOKENIZER.decode(r.prompt).endswith("<think></think>") for _, r in talk.asked]
    assert ends == [False, True, False]
    assert out.count("thinking = off") == 2 and "must be on or off" in out
    assert "no setting 'thinking'" in make().run("/set thinking off")


def test_system_clear_undo_and_history_change_or_print_the_conversation(make):
    talk = make()
    out = talk.run("/system Be brief.", "one", "two", "/undo", "/history", "/clear", "three")
    assert TOKENIZER.decode(talk.asked[0][1].prompt).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>"
    )
    assert "removed: two" in out and "> one\n1: one 1234" in out
    assert [said for said, _ in talk.session.history] == ["three"]
    assert "one" not in TOKENIZER.decode(talk.asked[2][1].prompt)
    talk.run("/system -", "four")
    assert TOKENIZER.decode(talk.asked[3][1].prompt).startswith("<|im_start|>user\nthree")


def test_retry_uses_the_next_seed_and_replaces_the_answer(make):
    talk = make()
    talk.run("one", "two", "/retry", "/retry", "three")
    assert [said for said, _ in talk.asked] == ["one", "two", "two", "two", "three"]
    assert [r.params.seed for _, r in talk.asked] == [1234, 1234, 1235, 1236, 1234]
    # The prompt does not contain the previous answer.
    assert talk.asked[1][1].prompt == talk.asked[3][1].prompt
    assert talk.session.history[1] == ("two", "4: two 1236") and len(talk.session.history) == 3


def test_saved_conversation_can_be_loaded_elsewhere(make, tmp_path):
    file = tmp_path / "talk.json"
    talk = make()
    talk.run("/system Brief.", "one", f"/save {file}")
    assert json.loads(file.read_text())["messages"][1] == {"role": "user", "content": "one"}
    other = make()
    other.run(f"/load {file}", "two")
    assert other.session.history[0] == talk.session.history[0] and other.session.system == "Brief."
    file.write_text(json.dumps(talk.session.messages()))  # a plain list can be loaded as well
    assert "loaded 1" in make().run(f"/load {file}")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/hlep", "no command /hlep (did you mean 'help'?)"),
        (":)", "no command :)"),
        ("/set temprature 1", "did you mean 'temperature'?"),
        ("/set top_k 1.5", "top_k is '1.5'; it must be an integer."),
        ("/set top_p 2", "top_p is 2.0; it must be above 0"),
        ("/set temperature nan", "temperature is nan; it must be a finite number"),
        ("/set top_k", "top_k is ''"),
        ("/set stop [1]", "stop is [1]; write a text, or a list"),
        ("/seed -1", "The seed is '-1'"),
        ("/seed x", "The seed is 'x'"),
        ("/undo", "nothing to undo"),
        ("/retry", "nothing to retry"),
        ("/save", "Name a file: /save FILE."),
        ("/save /proc/nothing/x", "cannot be written"),
        ("/load /nothing.json", "/nothing.json cannot be read (No such file or directory)."),
        ("/load /proc/self/environ", "is not JSON"),
        ("word " * 3000, "15,0"),
    ],
)
def test_bad_input_prints_one_sentence_and_the_conversation_continues(make, line, answer):
    talk = make()
    out = talk.run(line, "one")
    assert answer in out.splitlines()[0] and "1: one 1234" in out
    assert talk.session.params == SamplingParams(max_tokens=500, top_p=0.8)


def test_empty_lines_are_ignored_and_a_leading_space_sends_a_slash(make):
    talk = make()
    talk.run("", "   ", " /etc/hosts?", "/exit", "never")
    assert [said for said, _ in talk.asked] == [" /etc/hosts?"]


def test_base_model_continues_text_and_keeps_no_conversation(make):
    talk = make("raw", lambda request: iter(b"  more"))
    assert talk.run("def f():", "x").splitlines()[::2] == ["  more", "  more"]
    assert talk.session.history == []
    out = talk.run("/system Be brief.", "/history", "/show")
    assert (
        "has no system prompt" in out and "keeps no conversation" in out and "questions" not in out
    )


def test_control_characters_are_printed_escaped(make):
    talk = make(script=lambda request: iter(b"a\x1b[2Jb\rc\td\n\xc2\x9bx\x7f"))
    assert talk.run("one").startswith("a␛[2Jb␍c\td\n\ufffdx␡\n")


class Interrupting(io.StringIO):
    """Output stream that raises KeyboardInterrupt in its `at`-th write."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def write(self, text):
        self.at -= 1
        if self.at == 0:
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_stops_only_the_current_answer(make):
    talk = make(script=lambda request: iter(b"." * 9000))
    talk.session.params = SamplingParams(max_tokens=9000)
    talk.session.history.append(("before", "answer"))
    out = Interrupting(at=20)
    lines = PipeReader(io.StringIO("one\n/retry\n"))
    repl = Repl(talk.session, reader=lines, out=out, description="", seed=1, colour=False)
    first = threading.Thread(target=repl.run)
    first.start()
    first.join(30)
    assert "stopped; this answer is not part" in out.getvalue()
    # /retry sent the same message again, and that answer was completed.
    assert talk.session.history == [("before", "answer"), ("one", "." * 9000)]


def test_stopped_retry_keeps_the_previous_answer(make):
    talk = make()
    talk.run("one")
    talk.engine._script = lambda request: iter(b"." * 9000)
    repl = Repl(
        talk.session, reader=PipeReader(io.StringIO("/retry\n")), out=Interrupting(at=5),
        description="", seed=1, colour=False,
    )  # fmt: skip
    repl.run()
    assert talk.session.history == [("one", "1: one 1234")]


def test_second_ctrl_c_at_the_prompt_prints_how_to_exit(make):
    class ScriptedReader:
        """Returns the strings among `events` and raises the exceptions."""

        def __init__(self, *events):
            self.events = list(events)

        def read(self):
            event = self.events.pop(0)
            if isinstance(event, str):
                return event
            raise event

    def run(*events):
        out = io.StringIO()
        lines = ScriptedReader(*events, EOFError())
        Repl(make().session, reader=lines, out=out, description="", seed=1, colour=False).run()
        return out.getvalue()

    press = KeyboardInterrupt()
    assert run(press) == ""
    assert run(press, press) == "To leave, type /exit or press Ctrl-D.\n"
    assert "/exit" not in run(press, "hello", press)
