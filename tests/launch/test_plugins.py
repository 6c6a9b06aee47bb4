"""Another package's strategy, compressor, decoder, verb and benchmark: one file and its entry points, nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import saved_llama

ROOT = Path(__file__).parents[2]
MINE = '''
"""A strategy, a compressor, a decoder, a verb and a benchmark."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from apb.compress.base import COMPRESSORS, Compressor
from apb.decode.base import DECODERS, GO_ON, Decoder, forward
from apb.plan.split import blocks
from apb.strategies.anchored import Anchor, anchored_plan
from apb.strategies.base import STRATEGIES, Strategy
from bench.benchmarks.base import BENCHMARKS
from burst.registry import option
from launch.verbs.base import VERBS, Verb


def steps(host):
    return [
        *host.select(0),
        *host.pass_on(0),
        *host.attend_anchor(),
        *host.attend_block(0),
        *host.wait_passing(0),
        *host.attend_earlier(0),
    ]


@STRATEGIES.register("mine", "a few first tokens, and a few rows of every earlier block")
@dataclass(frozen=True)
class Mine(Strategy):
    complexity: ClassVar[int] = 1
    takes_compressor: ClassVar[bool] = True

    sinks: int = option(8, "first tokens that every block sees")
    rows: int = option(2, "rows that every block passes on")

    def plan(self, lengths, hosts, shape, compressor=None):
        return anchored_plan(
            steps,
            strategy=self.name,
            compressor=compressor.name if compressor else None,
            shape=shape,
            lengths=lengths,
            spans=blocks(lengths.context, hosts),
            held=[(rank,) for rank in range(hosts)],
            anchor=Anchor(self.sinks if hosts > 1 else 0, skip=0, question=0),
            route="ring" if hosts > 1 else "none",
            kept_rows=(self.rows,) * (hosts - 1) + (0,),
        )


@COMPRESSORS.register("mine", "every so manieth token")
@dataclass(frozen=True)
class EverySo(Compressor):
    every: int = option(3, "the distance of two tokens that are kept")

    def score(self, block):
        places = torch.arange(block.k_BKSD.shape[2])
        return (places % self.every == 0).float().expand(block.k_BKSD.shape[:-1])


@DECODERS.register("mine", "one token at a time, and no more than a few")
@dataclass(frozen=True)
class Few(Decoder):
    few: int = option(3, "the most tokens of an answer")
    path: str | None = option(None, "a free text", text=True)

    def generate(self, decoding):
        while True:
            cache = decoding.cache
            if cache.undecoded is not None:
                forward(decoding.adapter, decoding.kernel, decoding.transport, cache, [cache.undecoded])
                cache.undecoded = None
            ending = decoding.decide()
            if ending != GO_ON or len(decoding.ids) == self.few:
                return decoding.finished(ending)


@dataclass(frozen=True)
class Words:
    words: int = option(2, "how many")
    out: str | None = option(None, "a folder", text=True)


@VERBS.register("shout", "say something loudly")
class Shout(Verb):
    def settings(self):
        return Words

    def run(self, arguments, config, display):
        return {"said": "HO" * config.values["words"]}


@BENCHMARKS.register("mine", "nothing of note")
class Nothing(Verb):
    def settings(self):
        return Words

    def run(self, arguments, config, display):
        return {"words": config.values["bench"]["words"], "command": config.values["command"]}
'''
ENTRIES = "".join(
    f"[{group}]\n{name} = my_package\n\n"
    for group, name in (
        ("apb.strategies", "mine"),
        ("apb.compress", "mine"),
        ("apb.decode", "mine"),
        ("launch.verbs", "shout"),
        ("bench.benchmarks", "mine"),
    )
)
DRIVER = """
import contextlib, io, json, sys
import torch
from apb.compress import compressor
from apb.strategies import strategy
from launch.cli import main
from tests.support import tiny
from tests.support.planned import planned_twin

found = {}
for name, words in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(words)
    found[name] = [code, out.getvalue()]
adapter, prompt = tiny.tiny_llama(torch.float64), tiny.make_prompt(97)
engine = tiny.tiny_engine(adapter, strategy("mine", sinks=5), 3, compressor("mine", every=4))
handle = engine.prefill(prompt)
plan, scorer = engine.setup.plan(prompt), engine.setup.compressor
twin = planned_twin(adapter, tiny.rotation(adapter), prompt, plan, scorer)
found["twin"] = [float((engine.logits(handle) - twin.logits).abs().max()), sum(twin.sizes.rows)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What commands come to where the package is on the path, in one process of its own."""
    folder = tmp_path_factory.mktemp("plug-in")
    (folder / "my_package.py").write_text(MINE)
    about = folder / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRIES)
    document = folder / "document.txt"
    document.write_text("the king of the hill sees the sea. " * 9)
    common = [f"model={saved_llama(folder / 'model')}", "cluster=virtual", "cluster.hosts=3"]
    ask = ["ask", *common, "-d", str(document), "-q", "Who sees?", "decode.max_new_tokens=6"]
    mine = ["strategy=mine", "compress=mine", "decode=mine"]
    commands = {
        "ask": [*ask, *mine, "strategy.rows=3", "compress.every=5", "decode.few=2", "decode.path=a, b = c"],
        "swept": [*ask, "-m", "strategy=mine", "compress=mine,norm", "decode.max_new_tokens=1"],
        "auto": ["plan", *common, "context_tokens=60000", "strategy=auto"],
        "help": ["ask", "--help"],
        "overview": ["--help"],
        "wrong": [*ask, *mine, "decode.fewer=2"],
        "verb": ["shout", "words=3"],
        "bench": ["bench", "mine", "bench.words=5"],
        "bench help": ["bench", "mine", "--help"],
    }
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        capture_output=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        timeout=250,
    )
    assert done.returncode == 0, done.stderr.decode()
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_they_are_used_from_the_command_line(found: dict[str, Any]) -> None:
    code, out = found["ask"]
    document = json.loads(out)
    assert code == 0, document
    assert document["strategy"] == document["compressor"] == document["decoder"] == "mine"
    assert len(document["token_ids"]) == 2 and document["plan"]["per_host"][0]["kept_rows"] == 3
    code, out = found["swept"]
    assert code == 0 and [run["compressor"] for run in json.loads(out)["runs"]] == ["mine", "norm"]
    code, out = found["wrong"]
    assert code == 2 and "decode.few" in json.loads(out)["error"]["remedy"]


def test_auto_considers_the_strategy(found: dict[str, Any]) -> None:
    code, out = found["auto"]
    assert code == 0 and json.loads(out)["strategy"] == "mine"


def test_the_twin_knows_what_it_was_never_told_of(found: dict[str, Any]) -> None:
    error, rows = found["twin"]
    assert error < 1e-9 and rows == 4


def test_help_shows_them(found: dict[str, Any]) -> None:
    code, text = found["help"]
    assert code == 0
    for part in ("a few first tokens", "strategy.sinks=8", "compress.every=3", "decode.few=3", "decode.path=null"):
        assert part in text
    assert "say something loudly" in found["overview"][1]
    assert "bench.words=2" in found["bench help"][1]


def test_verbs_and_benchmarks_run(found: dict[str, Any]) -> None:
    assert [found["verb"][0], json.loads(found["verb"][1])] == [0, {"said": "HOHOHO"}]
    assert json.loads(found["bench"][1]) == {"words": 5, "command": "apb bench mine bench.words=5"}
