"""How distributed attention runs: order of events, same bits, threads, mistakes, failures, processes.

Shapes: B batch, H heads, S own tokens, D head dim.
"""

from __future__ import annotations

import importlib.util
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from burst.errors import HostFailure, UserError
from burst.execution.attend import attention
from burst.layouts.layout import layout
from burst.transport import Transport, VirtualWorld, run_virtual
from burst.transport.process_group import ProcessGroupTransport
from burst.transport.virtual import VirtualTransport
from tests.support.attention_cases import SCHEDULES, Case, compute, dense, inputs
from tests.support.attention_faults import one as fault

OTHERS: list[dict[str, Any]] = [
    {"n": 34},
    {"causal": False},
    {"schedule": "allgather"},
    {"scale": 0.2},
    {"soft_cap": 5.0},
    {"window": 4},
    {"accurate": True},
]


# -- order, determinism, threads -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ring", "double_ring", "burst", "usp", "allgather"])
@pytest.mark.parametrize("backward", ["kv", "q"])
def test_sends_are_posted_before_the_work_that_hides_them(way: str, backward: str) -> None:
    if way == "allgather" and backward == "q":
        pytest.skip("only keys and values travel in an all-gather")
    events: list[list[tuple[str, str]]] = [[] for _ in range(4)]
    watch = [lambda e, step, peer, log=log: log.append((e, step)) for log in events]
    case = Case(4, "zigzag", way, backward, heads=(4, 4), edges=(0, 64), causal=False, per_node=2)
    compute(case, VirtualWorld(4, nodes=case.nodes, observers=watch))
    for log in events:
        for phase in ("forward", "backward"):
            steps = [(e, s) for e, s in log if f" {phase}" in s and "heads-" not in s and e != "arrive"]
            works = [i for i, (e, _) in enumerate(steps) if e == "compute"]
            blocks = {s for e, s in steps if e == "post" and not any(x in s for x in ("sum", "return"))}
            assert blocks and len(works) == (2 if way == "usp" else 4)
            for step in blocks:
                posted, waited = steps.index(("post", step)), steps.index(("wait", step))
                assert any(posted < work < waited for work in works), (step, steps)


class Late(VirtualTransport):
    """Hands over a random number of times before every exchange, so that messages come in another order."""

    dice = random.Random(0)

    def _relay(self, *args: Any) -> Any:
        for _ in range(self.dice.randrange(4)):
            self._world.hand_over(self, lambda: True, "late", None)
        return super()._relay(*args)


@pytest.mark.parametrize("way", SCHEDULES)
@pytest.mark.parametrize("backward", ["kv", "q"])
def test_same_bits_in_every_run_and_under_delays(way: str, backward: str) -> None:
    if way == "allgather" and backward == "q":
        pytest.skip("only keys and values travel in an all-gather")
    case = Case(4, "striped", way, backward, (8, 2), (0, 61), dtype=torch.float32, per_node=2)
    first, _ = compute(case)
    for seed in range(10):
        world = VirtualWorld(4, nodes=case.nodes)
        if seed >= 5:
            Late.dice = random.Random(seed)
            world.transports = [Late(r, world, nodes=case.nodes) for r in range(4)]
        assert all(torch.equal(x, y) for x, y in zip(first, compute(case, world)[0], strict=True))


def test_backward_of_a_virtual_rank_stays_in_its_thread() -> None:
    # On a GPU, one autograd thread serves the device: ranks that wait for each other inside it would never
    # end.
    def rank(t: Transport) -> tuple[bool, bool]:
        seen = []
        x = torch.zeros(1, requires_grad=True)
        y = x * 2
        y.register_hook(lambda grad: seen.append(threading.get_ident()))
        y.backward()
        return torch._C._is_multithreading_enabled(), seen == [threading.get_ident()]

    assert run_virtual(2, rank) == [(False, True)] * 2
    assert torch._C._is_multithreading_enabled()


# -- mistakes and failures -----------------------------------------------------------------------------------


def call_with(t: Transport, n: int = 32, world: int | None = None, **options: Any) -> None:
    where = layout("zigzag", n, world or t.world)
    own = [torch.zeros(1, 2, where.counts[t.rank], 8, requires_grad=True) for _ in range(3)]
    attention(*own, transport=t, layout=where, **({"schedule": "ring"} | options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": "rnig"}, "unknown schedule 'rnig'"),
        ({"backward": "v"}, "unknown backward 'v'"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"soft_cap": 0.0}, "soft cap must be positive"),
        ({"window": 0}, "the window holds no key"),
        ({"window": 0, "schedule": "auto"}, "no schedule can run: the window holds no key"),
        ({"forward": "v"}, "unknown forward 'v'"),
        ({"forward": "q", "schedule": "allgather"}, "unknown traveller 'q'"),
        ({"ulysses": 2}, "only usp has head groups"),
        ({"ulysses": 2, "schedule": "auto"}, "only usp has head groups"),
        ({"sinks": torch.zeros(3)}, "one logit a head"),
        ({"checkpoint": 1.5}, "checkpoint is a fraction"),
        ({"checkpoint": 0.5, "causal": False}, "checkpoint needs a causal call"),
        ({"kernel": "cpuu"}, "unknown kernel"),
        ({"world": 3}, "differ in their ranks"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        run_virtual(2, lambda t: call_with(t, **options))
    assert error.value.remedy


@pytest.mark.parametrize("odd", OTHERS)
def test_ranks_that_disagree_are_named_before_the_first_send(odd: dict[str, Any]) -> None:
    world = VirtualWorld(3)
    with pytest.raises(HostFailure, match=r"hosts \[2\] hold another plan.* here: ring.*float32.*scale 0.35"):
        world.run(lambda t: call_with(t, **(odd if t.rank == 2 else {})))
    assert all(set(t.ledger.by_kind()) == {"agree"} for t in world.transports)


def test_a_rank_that_fails_later_ends_all() -> None:
    def rank(t: Transport) -> None:
        call_with(t)
        if t.rank == 1:
            raise RuntimeError("out of memory")
        call_with(t)

    with pytest.raises(RuntimeError, match="out of memory"):
        run_virtual(3, rank)


@pytest.mark.parametrize("way", SCHEDULES)
def test_training_goes_on_after_inference_on_the_same_transport(way: str) -> None:
    where = layout("zigzag", 64, 4)

    def rank(t: Transport) -> Tensor:
        q, k, v = (where.shard(x, t.rank, 2) for x in inputs((4, 2), 64, 8, 8, 1)[:3])
        with torch.inference_mode():
            first = attention(q, k, v, transport=t, layout=where, schedule=way)
        second = attention(q.requires_grad_(), k, v, transport=t, layout=where, schedule=way)
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        second.sum().backward()
        assert q.grad is not None and torch.equal(first, second)
        return q.grad

    assert all(grad.isfinite().all() for grad in run_virtual(4, rank))


@pytest.mark.parametrize("seed", [2, 3, 5, 9, 18, 23])
def test_processes_that_die_or_disagree_are_noticed_by_all_others(seed: int) -> None:
    row = fault(seed)
    assert row["ok"], row


# -- processes -----------------------------------------------------------------------------------------------


def process(rank: int, world: int, folder: str, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    t = ProcessGroupTransport.join(rank, world, store, timeout_s=60)
    for i, case in enumerate(cases):
        t.nodes = case.nodes
        drawn = inputs(case.heads, case.edges[-1], case.dim, case.value_dim, case.batch)
        where = layout(case.layout, case.edges[-1], world, case.edges)
        q, k, v = (where.shard(x, rank, 2).requires_grad_() for x in drawn[:3])
        options = {"schedule": case.schedule, "backward": case.backward, "window": case.window}
        out = attention(q, k, v, transport=t, layout=where, **options)
        assert isinstance(out, Tensor)
        out.backward(where.shard(drawn[3], rank, 2))
        torch.save([out.detach(), q.grad, k.grad, v.grad], f"{folder}/{i}-{rank}")
    t.close()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_over_gloo(world: int, tmp_path: Path) -> None:
    cases = [
        Case(world, name, way, backward, (4, 2), (0, 20, 97), window=window, per_node=world // 2)
        for name, window in (("zigzag", None), ("striped", 9))
        for way in SCHEDULES
        for backward in (("kv",) if way in ("allgather", "ulysses") else ("kv", "q"))
    ]
    multiprocessing.start_processes(process, (world, str(tmp_path), cases), nprocs=world, start_method="fork")
    for i, case in enumerate(cases):
        parts = [torch.load(tmp_path / f"{i}-{r}") for r in range(world)]
        virtual, _ = compute(case)
        where = layout(case.layout, case.edges[-1], world, case.edges)
        for j, (x, y) in enumerate(zip(virtual[:4], dense(case)[:4], strict=True)):
            whole = where.unshard([p[j] for p in parts], 2)
            assert (whole - y).abs().max() <= 1e-11, case.key
            assert torch.equal(whole, x), case.key  # the transport does not show in the bits


def example(name: str) -> Any:
    path = Path(__file__).parents[2] / "docs" / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_training_example_matches_one_rank() -> None:
    assert example("train_tiny").main(processes=False)


@pytest.mark.parametrize("world, n_tokens", [(1, 5), (4, 50), (5, 7), (6, 3)])
def test_the_plain_ring_gives_the_same_bits(world: int, n_tokens: int) -> None:
    assert example("ring_loop").main(world, n_tokens)
