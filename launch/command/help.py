"""Help texts, made from the verbs' descriptions and the dataclasses of their settings."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from burst.errors import choose
from launch.verbs.base import VERBS, Verb

if TYPE_CHECKING:
    from burst.registry import Option
    from launch.config.groups import Group
    from launch.config.schema import Schema

MODEL = "a name of the list below, a folder with config.json, or a hub id 'organisation/model'"
_LEFT, _LEAST, _MOST, _PLAIN = 38, 70, 140, 110  # columns: of a setting, and of a whole line

Row = tuple[str, str]


def overview() -> str:
    """Return the text of ``apb --help``; imports no settings."""
    verbs = [(f"{name} NAME" if VERBS.get(name)().names is not None else name, VERBS.summary(name)) for name in VERBS]
    return "\n".join(
        [
            "apb: distributed long-context prefill for Hugging Face language models",
            "",
            "Usage: apb VERB [options] [key=value ...]",
            "",
            "Verbs:",
            *columns(verbs),
            "",
            "Start here:",
            *columns(VERBS.get("ask")().examples),
            "",
            "Options:",
            *columns(
                [("-h, --help", "this text; after a verb, its options and settings"), ("--version", "the version")]
            ),
            "",
            "Results: progress and tables go to stderr; the last line of stdout is one JSON document.",
            "Exit codes: 0 done, 2 something to change in the command, 1 a failure, 130 interrupted.",
        ]
    )


def verb_help(verb: Verb, name: str | None = None) -> str:
    """Return the text of ``apb VERB --help``, or of ``apb VERB NAME --help``; raises UserError for an unknown NAME."""
    from launch.config.groups import GROUPS

    schema = verb.schema()
    names = [choose(verb.name, name, schema.named)] if name and schema.named else list(schema.named)
    summary = VERBS.summary(verb.name)
    if name and verb.names is not None:
        summary = verb.names.summary(name)
    usage = ["[-d FILE|-]" if verb.document else "", "[-q TEXT]" if verb.query else "", "[-m]" if verb.sweeps else ""]
    title = " ".join(["apb", verb.name, *([name] if name else [])])
    shown = title if name or not schema.named else f"{title} NAME"
    lines = [
        *textwrap.wrap(f"{title}: {summary}", _width()),
        "",
        f"Usage: {' '.join([shown, *filter(None, usage)])} [key=value ...]",
        "",
        "Options:",
        *columns(_flags(verb)),
        "",
        "Settings (key=value, with their defaults):",
        *columns(_settings(schema)),
    ]
    if schema.named:
        lines += ["", f"{title} NAME:" if not name else "Settings of its own:"]
        for each in names:
            lines += columns(_named(verb, schema, each, header=not name))
    for group in [g for g in schema.groups() if any(g in [c.group for c in schema.choices(n)] for n in [None, *names])]:
        lines += ["", *_group(schema, names, group, GROUPS[group])]
    lines += [
        "",
        "experiment=CHOICE (settings for a purpose, chosen together):",
        *columns(_presets(GROUPS["experiment"])),
    ]
    examples = [row for row in verb.examples if not name or f" {name}" in row[0]]
    return "\n".join([*lines, "", "Examples:", *columns(examples)] if examples else lines)


def setting(option: Option, prefix: str = "") -> Row:
    """Return how an option is written with its default, and its help text."""
    return f"{prefix}{option.name}={written(option.default)}", option.help


def written(value: Any) -> str:
    """Return a value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    return str(value)


def columns(rows: Sequence[Row]) -> list[str]:
    """Return rows in two columns, the right one wrapped to the terminal's width."""
    left = min(max((len(word) for word, _ in rows), default=0), _LEFT)
    lines: list[str] = []
    for word, text in rows:
        parts = textwrap.wrap(text, _width() - left - 4) or [""]
        if len(word) > left:
            lines.append(f"  {word}")
            lines += [f"  {'':{left}}  {part}" for part in parts]
        else:
            lines += [f"  {word if not i else '':{left}}  {part}".rstrip() for i, part in enumerate(parts)]
    return lines


def _width() -> int:
    return max(_LEAST, min(_MOST, shutil.get_terminal_size((_PLAIN, 24)).columns))


def _flags(verb: Verb) -> list[Row]:
    found = []
    if verb.document:
        found.append(("-d, --document FILE", "the document, UTF-8 text; - is standard input; left out: a built-in one"))
    if verb.query:
        found.append(("-q, --query TEXT", "the question, any text"))
    if verb.sweeps:
        found.append(("-m, --multirun", "run every combination of lists, key=a,b, and ranges, key=range(1,5)"))
    return [
        *found,
        ("--config-dir DIR", "a folder with presets of your own: DIR/experiment/NAME.yaml, DIR/model/NAME.yaml, ..."),
        ("-v, --verbose", "show the libraries' warnings, and the traceback of a bug"),
        ("-h, --help", "this text"),
    ]


def _settings(schema: Schema) -> list[Row]:
    model = [(f"model={c.default}", MODEL) for c in schema.choices(None) if c.group == "model"]
    options = sorted(schema.options(None).values(), key=lambda option: option.name == "out")
    return [*model, *map(setting, options)]


def _named(verb: Verb, schema: Schema, name: str, header: bool) -> list[Row]:
    """Return what a NAME is about, what it chooses by default, and its own options."""
    assert verb.names is not None
    mark = " (default)" if name == schema.default else ""
    rows = [(f"{name}{mark}", verb.names.summary(name))] if header else []
    common = schema.options(None)
    prefix = f"{schema.root}." if schema.nested else ""
    rows += [
        setting(option, f"{'  ' if header else ''}{prefix}")
        for key, option in schema.options(name).items()
        if key not in common
    ]
    shared = schema.choices(None)
    groups = [f"{c.group}={written(c.default)}" for c in schema.choices(name) if c not in shared]
    return [*rows, *([("  and, by default:" if header else "and, by default:", " ".join(groups))] if groups else [])]


def _group(schema: Schema, names: Sequence[str], group: str, kind: Group) -> list[str]:
    found = [c for n in [None, *names] for c in schema.choices(n) if c.group == group]
    defaults = {c.default for c in found}
    default = found[0].default if len(defaults) == 1 else None
    notes = "; ".join(dict.fromkeys(c.note for c in found if c.note))
    head = f"{group}=CHOICE{f' ({notes})' if notes else ''}:"
    if kind.presets:
        rows = _presets(kind, default)
        return [head, *columns(rows), *(columns([setting(o, f"{group}.") for o in kind.own("")]) if rows else [])]
    rows = [("with every one:", "")] if kind.shared() else []
    rows += [setting(option, f"  {group}.") for option in kind.shared()]
    for name in sorted(kind.names(), key=lambda n: n != default):
        rows.append((f"{name}{' (default)' if name == default else ''}", kind.summary(name)))
        rows += [setting(option, f"  {group}.") for option in kind.own(name)]
    return [head, *columns(rows)]


def _presets(kind: Group, default: str | None = None) -> list[Row]:
    return [(f"{n}{' (default)' if n == default else ''}", kind.summary(n)) for n in kind.names()]
