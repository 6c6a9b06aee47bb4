"""The page docs/options.md, made from the same declarations as ``--help``.

Made anew by: python -m launch.command.reference > docs/options.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from burst.registry import Option
from launch.command.help import MODEL, setting, written
from launch.config.groups import GROUPS
from launch.config.schema import Schema
from launch.verbs.base import VERBS, Verb

HEAD = """# Options

Every key of the command line, `key=value`, with its default. Made by `python -m launch.command.reference >
docs/options.md` from the dataclasses that declare the options, as `apb VERB --help` is. In Python the options of an
engine are parameters of `Engine.launch`, and those of strategies, compressors, decoders and clusters fields of their
classes. Packages that are installed beside this one may add names; `--help` lists them.
"""


def reference() -> str:
    """Return the text of docs/options.md."""
    lines = [HEAD]
    groups: list[str] = []
    for name in VERBS:
        verb = VERBS.get(name)()
        schema = verb.schema()
        groups += [group for group in schema.groups() if group not in groups]
        lines += _verb(verb, schema)
    for group in [*groups, "experiment"]:
        lines += _group(group)
    return "\n".join(lines).rstrip() + "\n"


def _verb(verb: Verb, schema: Schema) -> Iterator[str]:
    yield f"## apb {verb.name}{' NAME' if schema.named else ''}\n"
    yield f"{_sentence(VERBS.summary(verb.name))}{_chooses(schema, None)}\n"
    yield from _table(map(setting, schema.options(None).values()))
    common = schema.options(None)
    for name in schema.named:
        assert verb.names is not None
        yield f"### apb {verb.name} {name}\n"
        yield f"{_sentence(verb.names.summary(name))}{_chooses(schema, name)}\n"
        own = {key: option for key, option in schema.options(name).items() if key not in common}
        yield from _table((f"{key}={written(option.default)}", option.help) for key, option in own.items())


def _chooses(schema: Schema, name: str | None) -> str:
    shared = schema.choices(None) if name else []
    found = [f"`{c.group}={written(c.default)}`" for c in schema.choices(name) if c not in shared]
    return f" Chooses, by default: {', '.join(found)}." if found else ""


def _group(group: str) -> Iterator[str]:
    kind = GROUPS[group]
    yield f"## {group}=CHOICE\n"
    if group == "model":
        yield f"{_sentence(MODEL)}\n"
    if shared := kind.shared():
        yield "With every one:\n"
        yield from _table(_settings(group, shared))
    if kind.presets:
        yield from _table(((name, kind.summary(name)) for name in kind.names()), "choice")
        if own := kind.own(""):
            yield from _table(_settings(group, own))
        return
    for name in kind.names():
        yield f"### {group}={name}\n"
        yield f"{_sentence(kind.summary(name))}\n"
        yield from _table(_settings(group, kind.own(name)))


def _settings(group: str, options: Iterable[Option]) -> Iterator[tuple[str, str]]:
    return (setting(option, f"{group}.") for option in options)


def _table(rows: Iterable[tuple[str, str]], left: str = "key and default") -> Iterator[str]:
    cells = [(f"`{word}`", text.replace("|", "\\|").replace("<", "&lt;")) for word, text in rows]
    if cells:
        yield f"| {left} | meaning |\n|---|---|"
        yield from (f"| {word} | {text} |" for word, text in cells)
        yield ""


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    sys.stdout.write(reference())
