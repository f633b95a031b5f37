"""Generation defaults of released folders, and refusal of invalid files."""

import json

import pytest

from qwen_jax.errors import UserError
from qwen_jax.generate.generation_config import read_defaults
from qwen_jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))
EOD, START, END = TOKENIZER.eod_id, TOKENIZER.im_start_id, TOKENIZER.im_end_id

# The chat templates of Qwen2.5 and Qwen3, without tools and thinking.
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN3 = QWEN25.replace("{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}", "{{- '' }}")


def folder(tmp_path, generation=None, template=None, jinja=None):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    if template is not None:
        config = {"chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    return tmp_path


def test_defaults_of_qwen_7b_chat(tmp_path):
    """The file of the last release of Qwen-7B-Chat, with the ids of the test vocabulary."""
    found = read_defaults(
        folder(
            tmp_path,
            {
                "chat_format": "chatml",
                "do_sample": True,
                "eos_token_id": EOD,
                "max_new_tokens": 512,
                "max_window_size": 24000,
                "pad_token_id": EOD,
                "repetition_penalty": 1.1,
                "top_k": 0,
                "top_p": 0.8,
                "transformers_version": "4.31.0",
            },
        ),
        TOKENIZER,
    )
    assert (found.chat_format, found.max_window) == ("chatml", 24000)
    assert found.system == "You are a helpful assistant."
    params = found.params
    assert (params.max_tokens, params.temperature, params.top_k) == (512, 1.0, 0)
    assert (params.top_p, params.repetition_penalty) == (0.8, 1.1)
    # `eos_token_id` is an int; the others are the release's stop words of a chat.
    assert params.stop_ids == (EOD, END, START)


def test_defaults_of_a_base_model_and_without_a_file(tmp_path):
    found = read_defaults(
        folder(
            tmp_path,
            {
                "chat_format": "raw",
                "do_sample": True,
                "eos_token_id": EOD,
                "stop_words_ids": [[EOD], [*b"Human:"]],
                "top_p": 0.8,
            },
        ),
        TOKENIZER,
    )
    assert found.chat_format == "raw" and found.params.stop_ids == (EOD,)
    assert found.stop == ("Human:",)
    none = read_defaults(None, TOKENIZER)
    assert none.chat_format == "raw" and none.params.stop_ids == (EOD,)
    assert none.params.temperature == 1.0


@pytest.mark.parametrize(("template", "system"), [(QWEN25, "You are Qwen."), (QWEN3, None)])
@pytest.mark.parametrize("place", ["template", "jinja"])
def test_end_tokens_and_template_determine_a_chat_model_and_its_system_prompt(
    tmp_path, template, system, place
):
    generation = {
        "do_sample": True, "eos_token_id": [END, EOD], "temperature": 0.7, "top_k": 20,
        "top_p": 0.8, "repetition_penalty": 1.05,
    }  # fmt: skip
    found = read_defaults(folder(tmp_path, generation, **{place: template}), TOKENIZER)
    assert found.chat_format == "chatml" and found.system == system
    assert found.params.stop_ids == (END, EOD, START)
    assert (found.params.temperature, found.params.top_k) == (0.7, 20)


def test_base_model_with_a_chat_template_is_a_base_model(tmp_path):
    generation = {"do_sample": False, "eos_token_id": EOD, "max_new_tokens": 2048}
    found = read_defaults(folder(tmp_path, generation, QWEN25), TOKENIZER)
    assert found.chat_format == "raw" and found.params.temperature == 0
    assert read_defaults(tmp_path, TOKENIZER, chat_format="chatml").system == "You are Qwen."


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for %}", "{{ ''.__class__.__mro__ }}x"])
def test_failing_chat_template_gives_the_default_system_prompt_or_none(tmp_path, template):
    """Broken templates, and one with access to Python internals, which the sandbox blocks."""
    found = read_defaults(folder(tmp_path, {"eos_token_id": [END]}, template), TOKENIZER)
    assert found.chat_format == "chatml"
    assert found.system in ("You are a helpful assistant.", None)


@pytest.mark.parametrize(
    "broken",
    [
        {"eos_token_id": "151643"},
        {"eos_token_id": [1, "2"]},
        {"stop_words_ids": [1]},
        {"top_p": "0.8"},
        {"top_p": 0.0},
        {"max_new_tokens": 1.5},
        {"do_sample": 1},
        {"top_k": True},
        {"eos_token_id": list(range(9))},
    ],
)
def test_invalid_values_are_refused(tmp_path, broken):
    name = next(iter(broken))
    names = {"eos_token_id": "eos_token_id|stop_ids", "max_new_tokens": "max_new_tokens|max_tokens"}
    with pytest.raises(UserError, match=rf"generation_config.*({names.get(name, name)})"):
        read_defaults(folder(tmp_path, {"chat_format": "chatml"} | broken), TOKENIZER)


def test_unknown_chat_format_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'chatlm' .did you mean 'chatml'"):
        read_defaults(folder(tmp_path, {"chat_format": "chatlm"}), TOKENIZER)
