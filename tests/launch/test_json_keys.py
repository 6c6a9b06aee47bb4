"""The keys of every command's JSON document are those that were committed: programs of others read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apb.draft.base import LayerShape
from apb.draft.eagle import EagleHead
from apb.draft.files import save
from apb.host.load import load_adapter
from apb.host.messages import HostSpec
from launch.cli import main
from tests.support.tiny import llama_config, saved_llama

KEPT = Path(__file__).parent / "json_keys.json"
SHAPE = (
    "model=llama3.1-8b-shape bench.device=cpu bench.dtype=float32 model.config.hidden_size=64 "
    "model.config.intermediate_size=96 model.config.num_hidden_layers=2 model.config.num_attention_heads=4 "
    "model.config.num_key_value_heads=2 model.config.head_dim=16 model.config.vocab_size=300"
)
ASK = "ask model={model} -d {document} -q Who? cluster=virtual cluster.hosts=3 decode.max_new_tokens=4"
PLAN = "plan model={model} memory_gb=80 cluster.hosts=4"
BENCH = "model={model} bench.device=cpu bench.dtype=float32 cluster.hosts=2"
COMMANDS = {
    "ask": ASK,
    "ask, compared": f"{ASK} compare=true",
    "ask, exact": f"{ASK} strategy=ring decode.placement=gathered",
    "ask, eagle2": f"{ASK} decode=eagle2 decode.head={{head}}",
    "ask, lookup": f"{ASK} decode=lookup",
    "ask, sweep": f"{ASK} -m strategy=star,spava",
    "ask, refused": f"{ASK} cluster.hosts=1000",
    "plan": f"{PLAN} -d {{document}} -q Who?",
    "plan, lengths": f"{PLAN} context_tokens=400",
    "plan, burst": f"{PLAN} context_tokens=400 strategy=ring burst.explain=true burst.nodes=2",
    "bench attention": "bench attention bench.tokens=32 bench.ranks=2 bench.repeats=1 bench.warmup=0 bench.device=cpu",
    "bench decode": "bench decode model={model} bench.device=cpu bench.dtype=float32 decode=eagle2 decode.head={head} "
    "decode.depth=2 decode.width=3 decode.tokens=5 bench.kinds=[general] bench.contexts=[40] bench.prompts=1 "
    "bench.new_tokens=6 bench.sizes=[3]",
    "bench emulate": f"bench emulate {SHAPE} bench.hosts=2 bench.tokens=80 bench.warmup_tokens=80 bench.repeats=1 "
    "bench.strategies=[full,ring,apb]",
    "bench kernels": f"bench kernels {SHAPE} bench.tokens=[16] bench.repeats=1",
    "bench report": "bench report bench.results={folder} bench.growth_hosts=[2]",
    "bench ruler": f"bench ruler {BENCH} bench.tokens=600 bench.samples=2 bench.tasks=[vt_1hop]",
    "bench simulate": "bench simulate model=llama3.1-8b-shape bench.tokens=[4096,32768] bench.hosts=[4,8]",
    "bench throughput": f"bench throughput {BENCH} bench.tokens=200 bench.new_tokens=2 bench.warmup=0 bench.repeats=1",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model, a draft head of it, a document and an empty folder."""
    return made(tmp_path_factory.mktemp("keys"))


def made(folder: Path) -> dict[str, str]:
    """Write what the commands name."""
    model = saved_llama(folder / "model")
    head = folder / "head.safetensors"
    torch.manual_seed(3)
    target = load_adapter(HostSpec(model, "float32", "cpu")).draft_target()
    save(head, EagleHead(LayerShape.of(llama_config().to_dict()), target, fc_bias=True, window=32, sinks=2), {})
    document = folder / "document.txt"
    document.write_text("the king of the hill sees the sea. " * 9)
    (folder / "empty").mkdir()
    return {"model": model, "head": str(head), "document": str(document), "folder": str(folder / "empty")}


def new_and_missing(name: str, document: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the keys of a document that are not kept, and those kept that it has not."""
    found, kept = set(keys(document)), set(json.loads(KEPT.read_text())[name])
    return sorted(found - kept), sorted(kept - found)


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Return a document's dotted keys: lists by their first element, the options that it repeats not at all."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield f"{path}{name}"
            yield from keys(each if name != "configuration" else None, f"{path}{name}.")
    if isinstance(value, list) and value:
        yield from keys(value[0], f"{path}0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_keys_stay(name: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main(COMMANDS[name].format(**places).split())
    assert new_and_missing(name, json.loads(capsys.readouterr().out)) == ([], [])
