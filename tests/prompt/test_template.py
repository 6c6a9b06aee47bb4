"""Chat templates as foreign programs: what transformers writes, and an end to those that go on or write for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from apb.prompt import renderer
from apb.prompt.conversation import make_conversation
from apb.prompt.prompt import make_prompt
from apb.prompt.renderer import TemplateFailure, fill
from apb.prompt.template import render
from burst.errors import UserError
from tests.prompt.test_conversation import TEMPLATES
from tests.support import words as forms
from tests.support.words import words

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "\nA lamp.\n\nWho?", "name": None},
    {"role": "assistant", "content": "Orrin.", "tool_calls": [{"function": {"name": "lit", "arguments": {"é": 1}}}]},
    {"role": "user", "content": "And <b>then</b>?"},
]
OTHERS = {
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if ns.n == 3 %}"
    "{% continue %}{% endif %}{{ ns.n ~ m.content | upper }}{% endfor %}{{ dict(a=1) | tojson(indent=2) }}",
    "date": "{{ strftime_now('%Y') }}{{ strftime_now(format='%Y') }}{{ bos_token }}{{ tools | tojson }}{{ more }}",
    "blocks": "{% if true %}\n  {{ messages | length }}\n{% endif %}\n  {% if false %}{% endif %}\nend\n",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{% if tools is none %}no tools{% endif %}{{ documents }}",
}
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "times": "{{ 'x' * 10 ** 10 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "width": "{{ 'a'.center(10 ** 11) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "writing": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "range": "{{ range(10 ** 9) | list }}",
    "nesting": "{{ " + "(" * 50_000 + ")" * 50_000 + " }}",
}


@pytest.mark.parametrize("template", [*forms.TEMPLATES.values(), *TEMPLATES.values(), *OTHERS.values()])
def test_templates_are_filled_in_as_in_transformers(template: str) -> None:
    tokenizer = words("llama3", "chatml")
    options: dict[str, Any] = {"chat_template": template, "more": [1, "é"]}
    for talk in (TALK, TALK[1:2]):
        want = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **options)
        assert render(tokenizer, [talk, talk], **options) == [want, want]


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_without_end_are_refused(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"cannot be filled in: (it |Range too big)"):
        make_conversation(words("gpt2", "chatml"), TALK[1:2], chat_template=ENDLESS[name])
    assert time.perf_counter() - start < 60  # two seconds on a quiet machine
    assert fill("{{ a }}", [{"a": 1}]) == ["1"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate"),
        ("{% for m in messages %}{{ m.name.first }}{{ m.content }}{% endfor %}", "no attribute"),
        ("{% for m in messages %}{{ m.content", "line 1: "),
        ("{{ ''.__class__.__mro__ }}", ""),
        ("{{ 1 / 0 }}", "division by zero"),
        ({"rag": "{{ messages }}", "tool_use": "{{ messages }}"}, "default"),
        (12, ""),
    ],
)
def test_errors_of_templates_are_the_model_files(template: Any, says: str) -> None:
    tokenizer = words.__wrapped__("gpt2", "chatml")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"the chat template (of .* cannot be filled in|changes or drops)") as caught:
        make_prompt(tokenizer, "A lamp.", "Who?", chat=True)
    assert says in str(caught.value) and "chat=false" in caught.value.remedy


def test_threads_take_turns() -> None:
    tokenizer = words("gpt2", "chatml")
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda i: make_prompt(tokenizer, f"Lamp {i}.", "Who?", chat=True).token_ids, range(24)))
    assert made == [make_prompt(tokenizer, f"Lamp {i}.", "Who?", chat=True).token_ids for i in range(24)]


def test_a_process_that_was_ended_is_started_anew() -> None:
    assert fill("{{ a }}", [{"a": 1}]) == ["1"]
    child = renderer._kept[0]._child
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TemplateFailure, match="runs for longer"):
        patch.setattr(renderer, "WALL_S", 0.2)
        fill("{{ a }}", [{"a": 2}])
    assert child.poll() is not None
    assert fill("{{ a }}", [{"a": 3}]) == ["3"]
    renderer._kept[0]._child.kill()
    renderer._kept[0]._child.wait()
    assert fill("{{ a }}", [{"a": 4}]) == ["4"]


def test_a_fork_has_a_process_of_its_own() -> None:
    assert fill("{{ a }}", [{"a": 1}]) == ["1"]
    child = os.fork()
    if child == 0:
        os._exit(0 if fill("{{ a }}", [{"a": 5}]) == ["5"] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert fill("{{ a }}", [{"a": 2}]) == ["2"]


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_it_ends_with_the_process_that_started_it(end: str) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    code = "import os\nfrom apb.prompt import renderer\nrenderer.fill('', [{}])\n"
    code += f"print(renderer._kept[0]._child.pid, flush=True)\n{end}"
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60)
    until = time.monotonic() + 20
    while Path(f"/proc/{int(said.stdout)}/cmdline").exists() and b"sandbox" in _command(int(said.stdout)):
        assert time.monotonic() < until
        time.sleep(0.02)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
