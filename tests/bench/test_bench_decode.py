"""``apb bench decode``, and eagle2 and lookup on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apb.decode.eagle2 import Eagle2
from apb.decode.lookup import Lookup
from apb.draft.base import LayerShape
from apb.draft.eagle import EagleHead
from apb.draft.files import save
from apb.draft.vocab import save as save_ranks
from apb.host.load import load_adapter
from apb.host.messages import HostSpec
from apb.layers.full import Full
from bench.decode.cli import loops, summary
from bench.decode.links import LINKS, winners
from bench.decode.measure import decoders, shape
from bench.decode.questions import questions
from bench.report.rows import read
from bench.report.tables import decoders as decoder_tables
from burst.errors import UserError
from tests.support.tiny import byte_tokenizer, llama_config

pytest_plugins = ("tests.support.command",)
VOCAB = 2400


@pytest.fixture(scope="session")
def head(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random EAGLE head of the tiny model."""
    adapter = load_adapter(HostSpec(str(model), "float32", "cpu"))
    torch.manual_seed(3)
    config = llama_config().to_dict()
    made = EagleHead(LayerShape.of(config), adapter.draft_target(), fc_bias=True, window=32, sinks=2)
    file = tmp_path_factory.mktemp("heads") / "tiny head.safetensors"
    save(file, made, {})
    return file


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A published frequency list of that model's vocabulary."""
    file = tmp_path / "freq_600.pt"
    save_ranks(file, torch.arange(600))
    return file


def test_ask_drafts_with_a_head_from_a_file(apb: Any, model: Path, document: Path, head: Path, ranks: Path) -> None:
    asked = ["ask", "-d", str(document), "-q", "Who sees the sea?", f"model={model}", "cluster=virtual"]
    asked += ["cluster.hosts=3", "decode.max_new_tokens=12", "dtype=float64"]
    plain = apb(*asked).document
    assert plain["decoder"] == "autoregressive" and plain["drafting"] is None and plain["accepted_length"] is None
    for more in (
        ["decode=lookup"],
        ["decode=eagle2", f"decode.head={head}"],
        ["decode=eagle2", f"decode.head={head}", "decode.width=1", "decode.tokens=6", "decode.tree=auto"],
        ["decode=eagle2", f"decode.head={head}", f"decode.frequency={ranks}", "decode.vocab=300"],
        ["decode=eagle2", f"decode.head={head}", "decode.window=null", "decode.placement=gathered"],
    ):
        ran = apb(*asked, *more)
        found = ran.document
        assert found["token_ids"] == plain["token_ids"], more
        assert found["accepted_length"] >= 1 and found["drafting"]["steps"] >= 1
        assert "tokens a verification, bonus included" in ran.err
        if "decode.vocab=300" in more:
            assert found["drafting"]["head_rows"] % 300 == 0
        assert found["hosts_decoding"] == (1 if "decode.placement=gathered" in more else 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["decode=eagle2"], ("no draft head is shipped", "decode.head")),
        (["decode=eagle2", "decode.head=nowhere"], ("there is no draft head 'nowhere'",)),
        (["decode=eagle2", "decode.head={head}", "decode.vocab=300"], ("no frequencies are known", "decode.frequency")),
        (
            ["decode=eagle2", "decode.head={head}", "decode.frequency={ranks}", "decode.vocab=601"],
            ("fewer ranked ids",),
        ),
        (["decode=eagle2", "decode.head={head}", "decode.frequency=gone.pt"], ("cannot be read",)),
        (["decode=eagle2", "decode.head={head}", "decode.window=0"], ("decode.window",)),
        (["decode=eagle2", "decode.head={head}", "decode.tokens=5000"], ("cannot be filled",)),
        (["decode=eagle2", "decode.head={head}", "decode.vocab=many"], ("decode.vocab", "auto")),
        (["decode=lookup", "decode.depth=3"], ("'lookup' has no option 'depth'", "decode=eagle2")),
        (["decode.placement=there"], ("placement", "gathered")),
    ],
)
def test_drafting_that_cannot_be_done_is_refused(
    apb: Any, model: Path, document: Path, head: Path, ranks: Path, options: list[str], words: tuple[str, ...]
) -> None:
    given = [option.format(head=head, ranks=ranks) for option in options]
    apb("ask", "-d", str(document), "-q", "Who?", f"model={model}", "cluster=virtual", *given).refused(*words)


def test_heads_of_another_model_are_refused(apb: Any, document: Path, head: Path, tmp_path: Path) -> None:
    from tests.support.tiny import build

    other = tmp_path / "other"
    build(llama_config(hidden_size=32, max_position_embeddings=600)).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    asked = ["ask", "-d", str(document), "-q", "Who?", f"model={other}", "cluster=virtual"]
    apb(*asked, "decode=eagle2", f"decode.head={head}").refused("belongs to another model", "hidden_size")


def test_the_benchmark_measures_keeps_and_resumes(apb: Any, model: Path, head: Path, tmp_path: Path) -> None:
    asked = ["bench", "decode", f"model={model}", "decode=eagle2", f"decode.head={head}", "bench.kinds=[general,code]"]
    asked += [
        "bench.contexts=[0,40]",
        "bench.prompts=1",
        "bench.new_tokens=6",
        "bench.sizes=[3]",
        f"out={tmp_path / 'out'}",
    ]
    asked += ["decode.depth=2", "decode.width=3", "decode.tokens=5", "bench.dtype=float64"]
    found = apb(*asked).document
    assert found["counts_bonus_token"] and found["draft"] is not None
    names = {"autoregressive", "lookup of 16", "tree 2x3 of 5", "tree 2x3 of 3", "chain of 3"}
    for kind in ("general", "code", "all"):
        for context in (0, 40):
            here = {x["decoder"]: x for x in found["lines"] if (x["kind"], x["context"]) == (kind, context)}
            if not here:  # the random model's answer ended at once: it counts for nothing
                continue
            assert set(here) == names
            assert here["autoregressive"]["accepted_length"] == 1 == here["autoregressive"]["rows_per_step"]
            for x in here.values():
                assert x["same"] == x["answers"] and x["accepted_length"] >= 1 and x["work_per_step_s"] > 0
            assert here["chain of 3"]["rows_per_step"] <= 3 < here["tree 2x3 of 5"]["rows_per_step"] <= 5
    rows = [json.loads(line) for line in (tmp_path / "out" / "decode.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 5 and all(row["command"].startswith("apb bench decode") for row in rows)
    assert (tmp_path / "out" / "accepted.png").stat().st_size > 1000
    before = (tmp_path / "out" / "decode.jsonl").read_text()
    assert apb(*asked).document["lines"] == found["lines"]
    assert (tmp_path / "out" / "decode.jsonl").read_text() == before

    (tmp_path / "2026-01-01-decode.jsonl").write_text(before)
    figure = tmp_path / "figure.svg"
    told = apb("bench", "report", f"bench.results={tmp_path}", f"bench.figure={figure}", "bench.growth_hosts=[2]")
    text = told.document["text"]
    assert told.document["rows"]["decode"] == len(rows) and f"![Accepted length]({figure})" in text
    assert "apb bench decode" in text and rows[0]["hardware"] in text and "commit" in text
    for x in found["lines"]:
        if x["kind"] == "all":
            assert f"| {x['decoder']}, {x['context']} tokens | {x['accepted_length']:.2f} |" in text
    assert "accepted length, bonus token counted" in figure.read_text()


def test_questions_come_from_files_too(tmp_path: Path) -> None:
    file = tmp_path / "gsm.jsonl"
    file.write_text('{"question": "How many?", "answer": "2"}\n\n{"prompt": "def f():"}\n')
    found = questions((), 5, (0, 100), str(file))
    assert [(q.kind, q.context, q.text) for q in found[:2]] == [("gsm", 0, "How many?"), ("gsm", 0, "def f():")]
    assert len(found) == 4
    with pytest.raises(UserError, match="no questions could be read"):
        questions((), 5, (0,), str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="kind of questions"):
        questions(("poems",), 5, (0,), None)
    far = questions(("general",), 1, (10**7,), None)[0]
    with pytest.raises(UserError, match="not that much prose"):
        far.prompt(byte_tokenizer())
    held = questions(("general", "math", "code"), 6, (0,), None)
    assert len({q.text for q in held}) == len(held) == 18


def test_loops_are_counted_and_left_out() -> None:
    row = {"kind": "math", "context": 0, "steps": 4, "decided": 8, "rows": 8, "head_rows": 0, "bytes": 0}
    row |= {"draft_s": 0.0, "verify_s": 0.0, "work_s": 1.0, "tokens_per_s": 2.0, "same": True, "shape": None}
    rows = []
    for number, repeats in enumerate([False, True, False]):
        for name in ("autoregressive", "lookup"):
            rows.append({**row, "number": number, "repeats": repeats, "decoder": name})
    rows[-1] |= {"decided": 16}
    rows += [{**row, "kind": "code", "number": 0, "repeats": True, "decoder": "autoregressive"}]
    lines = {(x["kind"], x["decoder"]): x for x in summary(rows)}
    assert lines["math", "lookup"]["answers"] == 2 and ("code", "autoregressive") not in lines
    assert lines["all", "lookup"]["accepted_length"] == (8 + 16) / 8
    assert [(x["kind"], x["answers"], x["loops"]) for x in loops(rows)] == [("math", 3, 1), ("code", 1, 1)]


def test_the_report_keeps_settings_apart_and_the_newest_rows(tmp_path: Path) -> None:
    row: dict[str, Any] = {"model": "m", "hardware": "h", "dtype": "float32", "variant": "full", "draft": None}
    row |= {"sampling": [0.0, 1.0, 0, 0], "new_tokens": 9, "placement": "sharded", "kind": "math", "context": 0}
    row |= {"steps": 4, "decided": 4, "rows": 8, "head_rows": 40, "bytes": 4000, "draft_s": 0.4, "verify_s": 0.8}
    row |= {"work_s": 1.0, "tokens_per_s": 2.0, "same": True, "shape": None, "repeats": False, "number": 0}
    row |= {"versions": {"torch": "2"}, "commit": "abc", "date": "2026-01-01", "command": "apb bench decode"}
    old = [{**row, "decoder": "autoregressive"}, {**row, "decoder": "lookup", "decided": 5}]
    loop = [{**each, "number": 1, "repeats": True, "decided": 100} for each in old]
    loop += [{**each, "context": 5000} for each in loop]
    sampled = [{**each, "sampling": [0.7, 1.0, 0, 0], "decided": 6} for each in old]
    new = [old[0], {**old[1], "decided": 8, "commit": "def"}]
    for day, rows in (("2026-01-02", new), ("2026-01-01", [*old, *loop, *sampled])):
        (tmp_path / f"{day}-decode.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    text = decoder_tables(read(tmp_path)["decode"])
    abouts = [line for line in text if line.startswith("Decoders")]
    assert len(abouts) == 2 and "temperature 0.7" in "".join(abouts)
    start = next(i for i, line in enumerate(text) if "greedy" in line)
    assert "abc, def" in text[start] and "h, torch 2" in text[start]
    lookup = next(line for line in text[start:] if "lookup" in line)
    assert lookup == "| lookup, 0 tokens | 2.00 | 2.0 | 10 | 100 ms | 200 ms | 125 ms | 1.0 kB | 1 (1) |"
    assert "| all, 5,000 tokens | - | - | - | - | - | - | - | 0 (1) |" in text[start:]
    assert decoder_tables([]) == []


def test_links_decide_between_trees_and_chains() -> None:
    import dataclasses

    from tests.support.tiny import tiny_llama

    sizes = dataclasses.replace(
        tiny_llama(torch.float32).shape, layers=32, mixers=(Full(32, 2, 128, 128),) * 32, element_size=2
    )
    lines: list[dict[str, Any]] = []
    for name, kind, length, rows, work in (
        ("autoregressive", None, 1.0, 1, 0.010),
        ("tree 5x8 of 16", "tree", 3.0, 16, 0.020),
        ("tree 5x8 of 16, lookup", None, 9.0, 16, 0.020),
        ("chain of 4", "chain", 2.2, 4, 0.013),
    ):
        line = {"context": 0, "decoder": name, "shape": kind, "accepted_length": length}
        lines.append(line | {"rows_per_step": rows, "work_per_step_s": work})
    faster = {r["link"]: r for r in winners(lines, sizes)}
    assert list(faster) == list(LINKS)
    assert faster["1 Gb/s, 100 us"]["faster"] == "chain"  # partial outputs of many rows take their time
    for link in faster.values():
        assert link["tree_tokens_per_s"] > 0 and link["plain_tokens_per_s"] > 0
    assert faster["3,600 Gb/s, 10 us"]["tree_tokens_per_s"] == pytest.approx(
        3.0 / (0.020 + 32 * 10e-6 + 7 * 16 * sizes.partial_bytes / (3600e9 / 8))
    )


def test_what_is_compared() -> None:
    assert list(decoders(Lookup(match=3), (4,))) == ["autoregressive", "lookup of 16", "lookup of 16, match 3"]
    made = decoders(Eagle2(), (4, 8))
    assert list(made)[2:] == ["tree 5x8 of 32", "tree 5x8 of 4", "chain of 4", "tree 5x8 of 8", "chain of 8"]
    assert made["chain of 8"] == Eagle2(depth=7, width=1, tokens=8)
    assert [shape(each) for each in made.values()] == [None, None, "tree", "tree", "chain", "tree", "chain"]
    chain = Eagle2(depth=3, width=1, tokens=3, tree="auto")
    assert list(decoders(chain, (8,)))[2:] == ["chain of 3, depth 3, auto", "tree 5x8 of 8", "chain of 8"]
    assert shape(chain) is None
    with pytest.raises(UserError, match="sizes has 14"):
        decoders(Eagle2(depth=2, width=3, tokens=13), (4, 14))
