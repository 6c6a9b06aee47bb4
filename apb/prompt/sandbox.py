"""Fill in chat templates in a process of its own, with limits on time and memory that the kernel enforces.

A chat template is a program of whoever published the model. Jinja's sandbox keeps it from objects, not from running for
ever or making gigabytes in one operation, so it runs here: a process that imports jinja2 alone, answers one request
after another, and dies of its limits without harm. ``apb.prompt.renderer`` starts it with the folders of jinja2 and
markupsafe as arguments.

Both ways a message is eight bytes of length and JSON in UTF-8. Request: ``template``, ``variables`` (one set a text),
``seconds`` (CPU time), ``characters`` (of all texts), ``bytes`` (address space). Answer: ``texts``, or ``error``.
The environment is the one that transformers fills chat templates in with.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any, BinaryIO


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    while head := requests.read(8):
        request = json.loads(requests.read(int.from_bytes(head, "big")))
        answer = json.dumps(_answer(request)).encode()
        answers.write(len(answer).to_bytes(8, "big") + answer)
        answers.flush()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    _limit_memory(request["bytes"])
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # nobody handles its signal: it ends this process
    try:
        return {"texts": _texts(request)}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:  # whatever a foreign program raises is its answer
        line = getattr(error, "lineno", None)
        said = " ".join(str(error).split())[:300] or type(error).__name__
        return {"error": said if line is None else f"line {line}: {said}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _limit_memory(None)  # the next request may be longer


def _limit_memory(wanted: int | None) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        if wanted is None:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        elif most == resource.RLIM_INFINITY or wanted < most:
            resource.setrlimit(resource.RLIMIT_AS, (wanted, most))


def _texts(request: dict[str, Any]) -> list[str]:
    template, left = _compiled(request["template"]), request["characters"]
    now, texts = datetime.datetime.now(), []  # one time for all texts

    def strftime_now(format: str) -> str:
        return now.strftime(format)

    for variables in request["variables"]:
        parts = []
        for part in template.generate(**{"strftime_now": strftime_now} | variables):
            left -= len(part)
            if left < 0:
                raise ValueError(f"it writes more than {request['characters']:,} characters")
            parts.append(part)
        texts.append("".join(parts))
    return texts


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)


@functools.cache
def _environment() -> Any:
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """The block that marks what the assistant says; it leaves the text as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Jinja's own, without names that begin with an underscore."""

        def __init__(*args: Any, **values: Any) -> None:
            self, *rest = args
            found = dict(*rest, **values)
            for name in found:
                _public(name)
            jinja2.utils.Namespace.__init__(self, found)

        def __setitem__(self, name: str, value: Any) -> None:
            _public(name)
            super().__setitem__(name, value)

    def _public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no {name!r}")

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: Any) -> None:
        raise jinja2.exceptions.TemplateError(str(message))

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": raise_exception, "namespace": Namespace}
    return made


if __name__ == "__main__":
    sys.path += sys.argv[1:]
    serve(sys.stdin.buffer, sys.stdout.buffer)
