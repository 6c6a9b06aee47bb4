"""Predictions against closed forms, choices that must come out, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from burst.errors import UserError
from burst.layouts.layout import layout
from burst.planner.__main__ import run
from burst.planner.planner import plan
from burst.planner.predict import predict
from burst.planner.topology import MACHINES, Link, Machine, topology
from burst.schedules import AttentionShape, schedule

GQA = AttentionShape(32, 8, 128, 128)
MHA = AttentionShape(32, 32, 128, 128)
# One FLOP a second is one unit of time; copies and calls cost nothing.
PLAIN = Machine(Link(1.0, 0.0), Link(1.0, 0.0), 1.0, 1e30, 0.0)


def unit(work: float, transfer: float, latency: float = 0.0) -> Machine:
    """Speeds at which one step of the test's ring works ``work`` and transfers ``transfer`` seconds."""
    rows, shape = 16, GQA
    flops = 2 * (shape.head_dim + shape.value_dim) * shape.q_heads * rows * rows
    link = Link(rows * shape.row_bytes("kv") / transfer, latency)
    return replace(PLAIN, intra=link, inter=link, flops=flops / work)


@pytest.mark.parametrize(("work", "transfer", "latency"), [(2.0, 1.0, 0.0), (1.0, 3.0, 0.0), (1.0, 3.0, 0.5)])
def test_a_ring_takes_the_longer_of_work_and_transfer(work: float, transfer: float, latency: float) -> None:
    where = topology(4, 1, unit(work, transfer, latency))
    found = predict(schedule("ring", layout("contiguous", 64, 4), GQA, causal=False), GQA, where)
    assert found.total_s == pytest.approx(3 * max(work, transfer + latency) + work)
    assert found.exposed_s == pytest.approx(found.total_s - 4 * work)
    assert found.imbalance == pytest.approx(1.0)


def test_causal_imbalance_of_contiguous_blocks() -> None:
    where = topology(8, 1, unit(1.0, 0.001))
    contiguous = predict(schedule("ring", layout("contiguous", 128, 8), GQA), GQA, where)
    zigzag = predict(schedule("ring", layout("zigzag", 128, 8), GQA), GQA, where)
    # The last rank works on P - 1/2 blocks, the mean is P / 2.
    assert contiguous.imbalance == pytest.approx(15 / 8, rel=0.01) and zigzag.imbalance == pytest.approx(1.0)
    assert contiguous.total_s / zigzag.total_s == pytest.approx(15 / 8, rel=0.01)


def test_a_double_ring_hides_slow_links_between_nodes() -> None:
    """A round takes max(I t_work, t_inter), in a flat ring I max(t_work, t_inter). Source: BurstAttention."""
    machine = unit(1.0, 0.5)
    slow = replace(machine, inter=Link(machine.intra.bandwidth / 8, 0.0))  # 4 s a block
    lay, nodes = layout("contiguous", 128, 8), [0] * 4 + [1] * 4
    flat = predict(schedule("ring", lay, GQA, nodes=nodes, causal=False), GQA, topology(8, nodes, slow))
    double = predict(schedule("double_ring", lay, GQA, nodes=nodes, causal=False), GQA, topology(8, nodes, slow))
    assert double.total_s == pytest.approx(8.0) and double.exposed_s == pytest.approx(0.0)
    assert flat.total_s > 2.5 * double.total_s
    assert double.sent_bytes["inter"] * 7 == sum(double.sent_bytes.values())


def test_the_choice_is_the_fastest_and_explained() -> None:
    found = plan(layout("zigzag", 131072, 8), GQA, topology(8, 2), backward=True)
    runnable = [c for c in found.candidates if c.forward is not None]
    assert len(found.candidates) == 6
    assert found.chosen.total_s <= min(c.total_s for c in runnable) * 1.01
    assert found.chosen.name in found.reason() and "not hidden" in found.reason()
    table = found.table()
    assert all(c.name in table for c in found.candidates) and "exposed ms" in table
    rows = found.to_dict()["candidates"]
    assert all(0 < row["percent_of_ideal"] <= 100.001 for row in rows)
    assert plan(layout("zigzag", 131072, 8), GQA, topology(8, 2), backward=True) == found


def test_choices_that_must_come_out() -> None:
    where, lay = topology(8, 2), layout("zigzag", 131072, 8)
    by_name = {c.name: c for c in plan(lay, MHA, where, backward=True).candidates}
    assert by_name["burst"].travels == ("kv", "qd") and by_name["ring"].travels == ("kv", "kv")
    assert by_name["burst"].total_s < by_name["double_ring"].total_s
    assert {c.name: c for c in plan(lay, GQA, where, backward=True).candidates}["burst"].travels == (
        "kv",
        "kv",
    )
    queries, keys = layout("zigzag", 126976, 8).extend(4096)
    chunk = plan(queries, GQA, where, keys=keys)
    assert chunk.chosen.travels == ("q",)
    assert {c.name for c in chunk.candidates if c.rejected} == {"ulysses", "usp"}
    alone = plan(layout("zigzag", 100, 1), GQA, topology(1))
    assert alone.chosen.name == "ring" and alone.chosen.exposed_s == 0.0
    nothing = plan(layout("zigzag", 0, 2), GQA, topology(2))
    assert nothing.chosen.total_s == 0.0 and "0.000 ms" in nothing.reason()


def test_schedules_that_cannot_run_are_listed_with_the_reason() -> None:
    found = plan(layout("zigzag", 100, 3), GQA, topology(3, [0, 0, 1]))
    refused = {c.name: c.rejected for c in found.candidates if c.rejected}
    assert set(refused) == {"double_ring", "usp"} and "cannot run" in found.table()
    with pytest.raises(UserError, match="no schedule can run"):
        plan(layout("zigzag", 100, 3), GQA, topology(3, [0, 0, 1]), names=("double_ring",))


def test_usp_takes_the_best_grid() -> None:
    few_heads = replace(GQA, q_heads=4, kv_heads=4)
    found = {c.name: c for c in plan(layout("zigzag", 131072, 16), few_heads, topology(16, 2)).candidates}
    assert found["usp"].ulysses in (2, 4) and found["ulysses"].ulysses is None
    assert f"usp {found['usp'].ulysses}x" in plan(layout("zigzag", 131072, 16), few_heads, topology(16, 2)).table()


def test_topologies() -> None:
    assert topology(5, 2).nodes == (0, 0, 0, 1, 1)
    where = topology(4, 2, "cpu")
    assert where.link(0, 1) == MACHINES["cpu"].intra and where.link(1, 2) == MACHINES["cpu"].inter
    for arguments, said in (
        ((4, 5), "1 to 4 nodes"),
        ((4, [0, 1]), "one node a rank"),
        ((4, 1, "cdua"), "Did you mean cuda"),
        ((4, 1, replace(PLAIN, flops=0.0)), "above 0"),
        ((4, 1, replace(PLAIN, flops=float("nan"))), "above 0"),
        ((0, 1), "needs a rank"),
    ):
        with pytest.raises(UserError, match=said):
            topology(*arguments)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--tokens", "4096", "--ranks", "4", "--nodes", "2"]
    assert run([*common, "--backward", "--flops", "1e12", "--inter-bandwidth", "1e9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert document["schedule"] == lines[1].split()[0] and len(document["candidates"]) == 6
    assert run([*common, "--history", "60000", "--window", "512"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["history"] == 60000
    assert run([*common, "--layout", "zigzig"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["given"] == "zigzig"


@pytest.mark.parametrize(
    "words",
    [
        "--batch -1",
        "--head-dim 0",
        "--q-heads 0",
        "--kv-heads 0",
        "--element-bytes 0",
        "--grad-bytes 0",
        "--window 0",
        "--q-heads 7 --kv-heads 2",
        "--intra-bandwidth nan",
        "--ranks 0",
        "--history -1",
        "--tokens -1",
    ],
)
def test_command_line_refuses_nonsense(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--tokens", "64", "--ranks", "2", *words.split()]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["message"] and error["remedy"] and "Use schedule" not in error["remedy"]


def test_command_line_counts_partial_outputs_in_their_type(capsys: pytest.CaptureFixture[str]) -> None:
    sent = []
    for size in ("2", "4"):
        words = "--tokens 64 --history 6400 --ranks 2 --q-heads 8 --kv-heads 8 --head-dim 64 --element-bytes"
        assert run([*words.split(), size]) == 0
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["candidates"]
        sent.append(next(row["intra_bytes"] for row in rows if row["schedule"] == "ring" and row["travels"] == ["q"]))
    # 64 rows of 8 heads: queries and partial outputs of 64 numbers, and an lse of 4 bytes.
    assert sent == [64 * 8 * (64 * size * 2 + 4) for size in (2, 4)]


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "burst.planner", "--tokens", "64", "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] == 64 and not done.stderr
