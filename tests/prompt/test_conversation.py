"""Where document and question stand in chat templates: Llama 3, Qwen, Mistral, SmolLM2 and MiniCPM."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from apb.prompt.conversation import make_conversation
from apb.prompt.prompt import Prompt
from burst.errors import UserError
from tests.support.tiny import byte_tokenizer

# Written for these tests after the models' published prompt formats.
LLAMA3 = """<|begin_of_text|>{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
{%- if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
QWEN = """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{% if m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MISTRAL = """<s>{% set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}
{%- if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {"content": ' + (m.content | tojson) + '}[/TOOL_RESULTS]' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"""
SMOLLM2 = """{% for m in messages %}{% if loop.first and m.role != 'system' %}
{{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MINICPM = """{% for m in messages %}{% if m.role == 'user' %}{{ '<用户>' + m.content.strip() + '<AI>' }}
{%- else %}{{ m.content.strip() }}{% endif %}{% endfor %}"""
TEMPLATES = {"llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL, "smollm2": SMOLLM2, "minicpm": MINICPM}
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<用户>", "<AI>", "</s>"]

DOCUMENT = "The king sees <|im_end|> the sea. </s> He reads <AI> [INST] all day.\n\nThe hill is high. " * 3 + "The end."
QUESTION = "Who sees the sea, user?"
every_template = pytest.mark.parametrize("name", TEMPLATES)


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a family's template; every family's marks are special tokens."""
    made = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()._tokenizer)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = TEMPLATES[name]
    return made


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def split(name: str, messages: list[Any], **options: Any) -> tuple[str, str, str, str, str]:
    """Return head, rest of the context, before, question and after, as text; check that together they are the
    template's own rendering, and that no text became a special token."""
    words = tokenizer(name)
    prompt = make_conversation(words, messages, **options)
    options.pop("question", None)
    rendered = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert words.decode(prompt.token_ids) == rendered
    special = set(words.convert_tokens_to_ids(SPECIAL))
    found = sum(i in special for i in prompt.token_ids)
    bare = [{**m, "content": m["content"].translate({ord(c): " " for c in "<|[/"})} for m in messages]
    assert found == sum(
        words.apply_chat_template(bare, tokenize=False, add_generation_prompt=True).count(s) for s in SPECIAL
    )
    assert prompt.question is not None
    parts = (
        prompt.context_ids[: prompt.head],
        prompt.context_ids[prompt.head :],
        prompt.question.before,
        prompt.question.ids,
        prompt.question.after,
    )
    head, rest, before, question, after = (words.decode(part) for part in parts)
    return head, rest, before, question, after


@every_template
def test_document_and_question_in_one_message(name: str) -> None:
    head, rest, before, question, after = split(name, [user(f"{DOCUMENT}\n\n{QUESTION}")])
    assert (rest, before, question) == (DOCUMENT, "\n\n", QUESTION)
    assert head and after


@every_template
def test_the_question_can_be_named(name: str) -> None:
    asked = "The end."
    _, rest, before, question, _ = split(name, [user(DOCUMENT)], question=asked)
    assert (rest, before, question) == (DOCUMENT.removesuffix(asked).rstrip(), " ", asked)


@every_template
def test_several_turns(name: str) -> None:
    turns = [user(DOCUMENT), {"role": "assistant", "content": "I have read it."}, user(QUESTION)]
    head, rest, before, question, after = split(name, turns)
    assert question == QUESTION
    assert rest == DOCUMENT and "I have read it." in before and DOCUMENT not in head + after


@every_template
def test_an_earlier_question_is_context(name: str) -> None:
    turns = [user(f"{DOCUMENT}\n\nWho reads?"), {"role": "assistant", "content": "He."}, user(QUESTION)]
    _, rest, before, question, _ = split(name, turns)
    assert rest == f"{DOCUMENT}\n\nWho reads?" and before.strip() and question == QUESTION


@every_template
def test_a_system_prompt(name: str) -> None:
    turns = [{"role": "system", "content": "Be brief."}, user(f"{DOCUMENT}\n\n{QUESTION}")]
    head, rest, _, question, _ = split(name, turns)
    assert question == QUESTION and rest.startswith(DOCUMENT[:60])
    assert "Be brief." in head


def test_mistral_puts_the_system_prompt_before_the_last_question() -> None:
    turns = [{"role": "system", "content": "Be brief."}, user(DOCUMENT), {"role": "assistant", "content": "Yes."}]
    head, rest, before, question, after = split("mistral", [*turns, user(QUESTION)])
    assert (head, question, after) == ("<s>[INST] ", QUESTION, "[/INST]")
    assert rest + before == f"{DOCUMENT}[/INST] Yes.</s>[INST] Be brief.\n\n"


@pytest.mark.parametrize("name", ["llama3", "qwen", "mistral"])
def test_a_tools_result_that_is_the_document(name: str) -> None:
    call = {"role": "assistant", "content": "I look it up."}
    head, rest, before, question, after = split(name, [user(QUESTION), call, {"role": "tool", "content": DOCUMENT}])
    assert QUESTION in head and before == after == ""
    assert rest.replace("\\n", "\n").strip('"') == DOCUMENT
    assert question  # what closes the result, and the generation prompt where the template has one


@pytest.mark.parametrize("name", ["llama3", "qwen"])
def test_a_tools_result_after_the_question(name: str) -> None:
    turns = [user(f"{DOCUMENT}\n\n{QUESTION}"), {"role": "assistant", "content": ""}, {"role": "tool", "content": "42"}]
    _, rest, _, question, after = split(name, turns)
    assert rest == DOCUMENT and question == QUESTION and "42" in after


def test_a_question_without_a_document() -> None:
    head, rest, before, question, after = split("smollm2", [user(QUESTION)])
    assert (rest, before, question) == ("", "", QUESTION)
    assert head.endswith("<|im_start|>user\n") and after == "<|im_end|>\n<|im_start|>assistant\n"


def test_trimmed_edges_are_the_templates_own() -> None:
    _, rest, before, question, _ = split("llama3", [user(f"  \n{DOCUMENT}\n\n{QUESTION}  \n")])
    assert (rest, before, question) == (DOCUMENT, "\n\n", QUESTION)


def test_lists_of_text_parts() -> None:
    parts = [{"type": "text", "text": f"{DOCUMENT}\n\n"}, {"type": "text", "text": QUESTION}]
    words = tokenizer("qwen")
    got: Prompt = make_conversation(words, [{"role": "user", "content": parts}])
    assert got == make_conversation(words, [user(f"{DOCUMENT}\n\n{QUESTION}")])


@pytest.mark.parametrize(
    ("messages", "options", "match"),
    [
        ([{"role": "system", "content": "Be brief."}], {}, "no question"),
        ([user("  ")], {}, "no question"),
        ([user(DOCUMENT)], {"question": "Who?"}, "does not end with"),
        ([user("a \ufdd0 b")], {}, "not text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "not text"),
        ([user(DOCUMENT)], {"chat_template": "{% for m in messages %}{{ m.content[:40] }}{% endfor %}"}, "changes"),
        ([user(DOCUMENT)], {"chat_template": "nothing"}, "changes"),
    ],
)
def test_what_cannot_be_split_is_refused(messages: list[Any], options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        make_conversation(tokenizer("qwen"), messages, **options)


def test_no_template_is_refused() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()._tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        make_conversation(words, [user(QUESTION)])
