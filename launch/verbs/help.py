"""The help texts, made from the verb table and from the comments in conf/."""

from __future__ import annotations

import re
from importlib import resources

from launch.verbs.verbs import VERBS, Verb, built

_SETTING = re.compile(r"^(\w+):\s*(.*?)(?:\s+#\s*(.*))?$")
_NESTED = re.compile(r"^\s+- /(\w+)@\S+: (\S+)(?:\s+#\s*(.*))?$")  # a group that only one choice of another has
_GROUP = re.compile(r"^\s+- (\w+): (\S+)(?:\s+#\s*(.*))?$")
_MODEL = "NAME of conf/model, folder with config.json, or hub id 'organisation/model'"

_EXAMPLES = {
    "bench": [
        ("apb bench attention", "our schedules beside one dense call and public peers"),
        ("apb bench attention bench.tokens=32768 bench.ranks=8 bench.dtype=bfloat16", "another size"),
        ("apb bench ruler cluster.hosts=8 bench.tasks=[vt_1hop]", "one task, with its baselines"),
        ("apb bench decode bench.contexts=[0,4000] decode.tree=auto", "decoders, trees and chains side by side"),
        ("apb bench ruler -m compress=query,norm out=DIR", "two compressors; stopped runs go on"),
    ],
    "ask": [
        ("apb ask", "four hosts on this machine, a built-in document"),
        ("apb ask cluster=virtual compare=true", "all hosts in one process, beside full attention"),
        ('apb ask -d report.txt -q "What was decided, and why?"', "your own document"),
        ("apb ask -m strategy=apb,star cluster.hosts=2,4", "four runs, one after another"),
    ],
    "train": [
        ("apb train retaining_heads model=org/name", "heads for a model, from generated prompts"),
        ("apb train retaining_heads -d book.txt method=ridge", "in a minute or two, with a text of yours"),
        ("apb train eagle model=org/name prompts=20000", "a draft head, from the model's own answers"),
        ("apb train frequency -d corpus.txt 'vocab=[8192,16384]'", "what a draft head drafts from"),
    ],
    "plan": [
        ("apb plan cluster.hosts=8 strategy=star", "the built-in document on eight hosts"),
        ("apb plan strategy=ring burst.explain=true", "and which exact schedule would be fastest"),
        (
            "apb plan model=org/name context_tokens=131072 memory_gb=80",
            "a length, for machines of 80 GB each",
        ),
    ],
}


def overview() -> str:
    """Return the text of ``apb --help``."""
    verbs = [(f"{name} {verb.name or ''}".strip(), verb.summary + _missing(name)) for name, verb in VERBS.items()]
    return "\n".join(
        [
            "apb: distributed long-context prefill for Hugging Face language models",
            "",
            "Usage: apb VERB [options] [key=value ...]",
            "",
            "Verbs:",
            *_columns(verbs),
            "",
            "Start here:",
            *_columns(_EXAMPLES["ask"]),
            "",
            "Options:",
            *_columns(
                [
                    ("-h, --help", "this text; after a verb, its options and settings"),
                    ("--version", "the version"),
                ]
            ),
            "",
            "Results: progress and tables go to stderr; the last line of stdout is one JSON document.",
            "Exit codes: 0 done, 2 something to change in the command, 1 a failure, 130 interrupted.",
        ]
    )


def verb_help(name: str) -> str:
    """Return the text of ``apb VERB --help``."""
    verb = VERBS[name]
    lines = [
        f"apb {name}: {verb.summary}{_missing(name)}",
        "",
        f"Usage: {_usage(name, verb)}",
        "",
        "Options:",
        *_columns(_options(verb)),
    ]
    if not _file(f"{name}.yaml").is_file():
        return "\n".join([*lines, "", "This verb has no settings."])
    own, groups = _root(name)
    groups += _nested(groups)
    lines += [
        "",
        "Settings (key=value, with their defaults):",
        *_columns([*((f"model={default}", _MODEL) for group, default, _ in groups if group == "model"), *own]),
    ]
    for group, default, comment in groups:
        if group == "model":
            continue
        lines += ["", f"{group}=CHOICE{f' ({comment})' if comment else ''}:"]
        lines += _columns(_choices(group, default))
    examples = _EXAMPLES.get(name, [])
    return "\n".join([*lines, "", "Examples:", *_columns(examples)] if examples else lines)


def _missing(name: str) -> str:
    return "" if built(name) else " (not built yet)"


def _usage(name: str, verb: Verb) -> str:
    parts = [
        "apb",
        name,
        verb.name or "",
        "[-d FILE|-]" if verb.document else "",
        "[-q TEXT]" if verb.query else "",
        "[-m]" if verb.sweeps else "",
    ]
    return " ".join([p for p in parts if p] + ["[key=value ...]"])


def _options(verb: Verb) -> list[tuple[str, str]]:
    found = []
    if verb.document:
        found += [
            (
                "-d, --document FILE",
                "the document, UTF-8 text; - is standard input; left out: a built-in one",
            ),
        ]
    if verb.query:
        found.append(("-q, --query TEXT", "the question, any text"))
    if verb.sweeps:
        found.append(("-m, --multirun", "run every combination of lists, key=a,b, and ranges, key=range(1,5)"))
    return [
        *found,
        ("-v, --verbose", "show the libraries' warnings, and the traceback of a bug"),
        ("-h, --help", "this text"),
    ]


def _root(name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """A root file's own settings, and its groups with default and comment; inherited ones come last."""
    settings: list[tuple[str, str]] = []
    groups: list[tuple[str, str, str]] = []
    parents: list[str] = []
    for line in _lines(f"{name}.yaml"):
        if (setting := _SETTING.match(line)) and setting[1] != "defaults":
            settings.append((f"{setting[1]}={setting[2]}", setting[3] or ""))
        elif group := _GROUP.match(line):
            groups.append((group[1], group[2], group[3] or ""))
        elif line.strip().startswith("- ") and line.strip() != "- _self_":
            parents.append(line.strip()[2:])
    for parent in parents:
        more_settings, more_groups = _root(parent)
        settings, groups = settings + more_settings, groups + more_groups
    return settings, groups


def _nested(groups: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Groups that come with one choice of these groups alone, with that choice in the comment."""
    found: list[tuple[str, str, str]] = []
    for group, _, _ in groups:
        for file in sorted(_file(group).iterdir(), key=lambda f: f.name):
            for line in _lines(f"{group}/{file.name}") if file.name.endswith(".yaml") else []:
                if nested := _NESTED.match(line):
                    choice = f"with {group}={file.name.removesuffix('.yaml')}"
                    found.append((nested[1], nested[2], f"{choice}; {nested[3]}" if nested[3] else choice))
    return found


def _choices(group: str, default: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    names = sorted(f.name.removesuffix(".yaml") for f in _file(group).iterdir() if f.name.endswith(".yaml"))
    for choice in sorted(names, key=lambda n: n != default):
        lines = _lines(f"{group}/{choice}.yaml")
        mark = " (default)" if choice == default else ""
        top_level = lines[0] == "# @package _global_"
        found.append((f"{choice}{mark}", lines[top_level].removeprefix("# ")))
        prefix = "" if top_level else f"{group}."
        for line in lines:
            if (setting := _SETTING.match(line)) and setting[1] not in ("name", "defaults"):
                found.append((f"  {prefix}{setting[1]}={setting[2]}", setting[3] or ""))
    return found


def _columns(rows: list[tuple[str, str]]) -> list[str]:
    width = min(max((len(left) for left, _ in rows), default=0), 34)
    lines: list[str] = []
    for left, right in rows:
        if len(left) > width:
            lines += [f"  {left}", f"  {'':{width}}  {right}"]
        else:
            lines.append(f"  {left:{width}}  {right}".rstrip())
    return lines


def _lines(path: str) -> list[str]:
    return _file(path).read_text(encoding="utf-8").splitlines()


def _file(path: str):
    return resources.files("conf").joinpath(path)
