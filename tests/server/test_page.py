"""The chat page in a headless browser: conversations, settings, errors, and script injection."""

import shutil
import time

import pytest
from playwright.sync_api import expect, sync_playwright

from qwen_jax.engine.request import SamplingParams
from qwen_jax.server.config import ServerLimits
from tests.generate.fake_engine import FakeEngine
from tests.server.serving import BYTES, TAGGED, make_model, script, serve

PHONE = {"viewport": {"width": 390, "height": 780}, "is_mobile": True, "has_touch": True}
CODE = "Here is `f`:\n\n```python\ndef f():\n    return '<b>'\n```\n\n**Done**, 世界."
MALICIOUS = (
    "<img src=x onerror=alert(1)><script>alert(2)</script>\n```html\n<script>alert(3)</script>\n"
    "```\n`<svg onload=alert(4)>` **<iframe src=javascript:alert(5)>**\n[x](javascript:alert(6))"
)


@pytest.fixture(scope="module")
def browser():
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    assert path, "no chromium: apt-get install chromium"
    expect.set_options(timeout=30_000)  # the machine may be busy
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=flags)
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """Returns a function that opens a server's page; script errors and dialogs fail the test."""
    contexts, problems = [], []

    def make(server, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append("a dialog opened"), dialog.dismiss()))
        page.goto(server.url)
        return page

    yield make
    for context in contexts:
        context.close()
    assert not problems


def send(page, text="Hi"):
    page.fill("#input", text)
    page.keyboard.press("Enter")


def wait_for_answer(page):
    expect(page.locator("#regenerate")).to_be_enabled()


def slowly(text, seconds=0.005):
    """Returns a script for `FakeEngine` with a delay before each token."""

    def answer(request):
        for token in BYTES.encode(text):
            time.sleep(seconds)
            yield token

    return answer


def test_conversation_is_rendered_regenerated_and_cleared(open_page):
    with serve(FakeEngine(script(CODE), max_length=4000)) as server:
        page = open_page(server)
        expect(page.locator("h1")).to_have_text("toy")
        send(page, "first\nquestion")
        wait_for_answer(page)
        answer = page.locator(".turn.assistant").last
        assert answer.locator("pre code").inner_text() == "def f():\n    return '<b>'"
        assert answer.locator("strong").inner_text() == "Done"
        assert answer.locator(":not(pre) > code").inner_text() == "f"
        assert "世界." in answer.inner_text() and "```" not in answer.inner_text()
        assert "tokens/s" in page.locator("#status").inner_text()
        assert page.locator("#status").inner_text().startswith(f"{len(CODE.encode())} tokens")
        assert page.locator("#input").input_value() == ""
        send(page, "second")
        wait_for_answer(page)
        # The whole conversation is sent, each turn once.
        prompt = BYTES.decode(server.engine.added[-1].prompt)
        assert f"user\nfirst\nquestion<|im_end|>\n<|im_start|>assistant\n{CODE}<|im_end|>" in prompt
        assert prompt.endswith("user\nsecond<|im_end|>\n<|im_start|>assistant\n")
        assert page.locator(".turn").count() == 4
        page.click("#regenerate")
        wait_for_answer(page)
        assert server.engine.added[-1].prompt == server.engine.added[-2].prompt
        assert page.locator(".turn").count() == 4
        page.click("#clear")
        assert page.locator(".turn").count() == 0
        send(page, "anew")
        wait_for_answer(page)
        assert "second" not in BYTES.decode(server.engine.added[-1].prompt)


def test_text_is_shown_while_generated_and_stop_cancels_it(open_page):
    engine = FakeEngine(slowly("0123456789" * 300), max_length=4000)
    long = SamplingParams(max_tokens=3000)
    with serve(engine, make_model(max_length=4000, default_params=long)) as server:
        page = open_page(server)
        send(page)
        expect(page.locator(".turn.assistant")).to_contain_text("0123")
        assert server.service.stats().running == 1
        page.click("#stop")
        wait_for_answer(page)
        server.wait_until(lambda: len(engine.cancelled) == 1)
        expect(page.locator(".turn.assistant .note")).to_have_text("Stopped.")
        shown = page.locator(".turn.assistant .text").inner_text()
        assert shown and ("0123456789" * 300).startswith(shown)
        # The text shown so far stays part of the conversation.
        send(page, "go on")
        expect(page.locator("#stop")).to_be_visible()
        server.wait_until(lambda: len(engine.added) == 2)
        assert f"assistant\n{shown}<|im_end|>" in BYTES.decode(engine.added[-1].prompt)
        page.keyboard.press("Escape")
        wait_for_answer(page)


def test_markup_in_messages_is_shown_as_text_and_inline_scripts_are_blocked(open_page):
    with serve(FakeEngine(script(MALICIOUS), max_length=4000)) as server:
        page = open_page(server)
        send(page, "<img src=x onerror=alert(7)>")
        wait_for_answer(page)
        assert page.locator("#log :is(img, script, iframe, svg, a)").count() == 0
        assert page.locator(".turn.user").inner_text() == "<img src=x onerror=alert(7)>"
        assert "<script>alert(2)</script>" in page.locator(".turn.assistant").inner_text()
        # The page's policy makes the browser block a script that is inserted nevertheless.
        violated = page.evaluate(
            """() => new Promise((resolve) => {
                document.addEventListener("securitypolicyviolation", (event) => {
                    resolve(event.effectiveDirective);
                });
                const made = document.createElement("script");
                made.textContent = "alert(8)";
                document.body.append(made);
            })"""
        )
        assert violated == "script-src-elem"


def test_settings_are_sent_validated_and_kept_after_a_reload(open_page):
    with serve(FakeEngine(script("ok"), max_length=4000)) as server:
        page = open_page(server)
        send(page)
        wait_for_answer(page)
        assert server.engine.added[-1].params.temperature == 1
        page.click("#toggle")
        values = {
            "temperature": "0.5",
            "top_p": "0.9",
            "top_k": "7",
            "seed": "11",
            "max_tokens": "2",
            "repetition_penalty": "1.2",
            "system": "Be brief.",
        }
        for name, value in values.items():
            page.fill(f"#{name}", value)
        send(page)
        wait_for_answer(page)
        params = server.engine.added[-1].params
        assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 7)
        assert (params.seed, params.max_tokens, params.repetition_penalty) == (11, 2, 1.2)
        assert "system\nBe brief.<|im_end|>" in BYTES.decode(server.engine.added[-1].prompt)
        expect(page.locator(".turn.assistant .note").last).to_contain_text("maximum length")
        page.reload()
        page.click("#toggle")
        assert page.locator("#temperature").input_value() == "0.5"
        page.fill("#temperature", "9")
        send(page)
        assert page.locator(".turn").count() == 0
        assert len(server.engine.added) == 2


def test_missing_api_key_is_reported_and_can_be_entered(open_page):
    with serve(FakeEngine(script("ok")), limits=ServerLimits(api_keys=("open-sesame",))) as server:
        page = open_page(server)
        expect(page.locator("#status")).to_contain_text("API key is missing")
        send(page)
        expect(page.locator(".turn .error")).to_contain_text("API key is missing")
        page.click("#toggle")
        page.fill("#key", "open-sesame")
        page.press("#key", "Tab")
        expect(page.locator("h1")).to_have_text("toy")
        page.click("#regenerate")
        expect(page.locator(".turn.assistant")).to_have_text("ok")
        wait_for_answer(page)
        assert "open-sesame" not in page.evaluate("JSON.stringify(localStorage)")


def test_errors_of_requests_engine_and_connection_are_shown(open_page):
    engine = FakeEngine(slowly("abc" * 100), max_length=500)
    with serve(engine, make_model(max_length=500)) as server:
        page = open_page(server)
        send(page, "x" * 600)
        expect(page.locator(".turn .error")).to_contain_text("this model supports 500")
        page.click("#clear")
        send(page)
        expect(page.locator(".turn.assistant")).to_contain_text("abc")
        engine.fail(RuntimeError("broken"))
        expect(page.locator(".turn .error")).to_contain_text("engine has failed")
        wait_for_answer(page)
    page.click("#regenerate")
    expect(page.locator(".turn .error")).to_have_text("The server can't be reached.")


def test_reasoning_is_shown_in_a_collapsed_block(open_page):
    reply = "<think>\nHm <b>.\n</think>\n\nYes."
    with serve(FakeEngine(script(reply, TAGGED)), make_model("qwen3", TAGGED)) as server:
        page = open_page(server)
        send(page)
        wait_for_answer(page)
        assert page.locator(".turn.assistant > .text").inner_text() == "Yes."
        details = page.locator(".turn.assistant details")
        assert details.get_attribute("open") is None
        details.locator("summary").click()
        assert details.locator(".text").inner_text() == "Hm <b>."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_screen_with_sufficient_contrast(open_page, scheme):
    with serve(FakeEngine(script(CODE + "x" * 200), max_length=4000)) as server:
        page = open_page(server, color_scheme=scheme, **PHONE)
        send(page, "y" * 100)
        wait_for_answer(page)
        page.click("#toggle")
        page.screenshot()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width == PHONE["viewport"]["width"]
        for selector in ("body", ".turn.user", "#send", ".note, #status", "pre", "#input"):
            assert contrast(page, selector) > 4.5, selector


def contrast(page, selector):
    """Returns the contrast ratio of an element's text by WCAG 2.1: 1 to 21, 4.5 is required."""
    pair = page.locator(selector).first.evaluate(
        """(node) => {
            const own = (n, name) => getComputedStyle(n)[name];
            let behind = node;
            while (/, 0\\)$|transparent/.test(own(behind, "backgroundColor"))) {
                behind = behind.parentElement;
            }
            return [own(node, "color"), own(behind, "backgroundColor")].map((color) =>
                color.match(/[\\d.]+/g).slice(0, 3).map(Number));
        }"""
    )

    def luminance(color):
        parts = [c / 255 for c in color]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, bright = sorted(map(luminance, pair))
    return (bright + 0.05) / (dark + 0.05)
