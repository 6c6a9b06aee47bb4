"""Ring passing is hidden behind compute: the last hop has arrived before any rank waits for it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from apb.compress import compressor
from apb.engine.requests import prefill_request
from apb.host.host import Host
from apb.host.messages import HostSpec, PrefillRequest
from apb.plan.bytes import passing_bytes
from apb.plan.plan import PrefillPlan
from apb.prompt.prompt import Prompt
from apb.strategies import strategy
from burst.errors import HostFailure
from burst.kernels import Kernel
from burst.transport import Handle, Message, VirtualWorld
from burst.transport.handles import RelayHandle
from burst.transport.process_group import ProcessGroupTransport
from burst.transport.virtual import VirtualTransport
from tests.support.pool import Pool, Rank, on_both
from tests.support.tiny import make_prompt, tiny_engine, tiny_llama

LAYERS, CONTEXT, HOP_S = 3, 203, 0.02
Event = tuple[int, str, str, int]  # rank, event, step, peer


class MovesInWait(Handle):
    """What passing must not be: blocks are sent, received and forwarded only once the caller waits."""

    def __init__(
        self, t: VirtualTransport, sends: Sequence[Message], recvs: Sequence[Message], step: str, to: int | None
    ):
        self._t, self._sends, self._recvs, self._step, self._to = t, sends, recvs, step, to

    def wait(self) -> None:
        self._t._observe("wait", self._step, -1)
        VirtualTransport._relay(self._t, self._sends, self._recvs, "passing", self._step, None).wait()
        if self._to is not None:
            onward = [Message(self._to, m.tensor) for m in self._recvs]
            VirtualTransport._relay(self._t, onward, [], "passing", self._step, None).wait()


class Logged:
    """A kernel that says what it is called for: attention within rows ("causal") or to others, and of how many."""

    name = "logged"

    def __init__(self, inner: Kernel, log: Callable[[str, int], None]):
        self._inner, self._log = inner, log

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        self._log("causal" if causal else "full", q.shape[2])
        return self._inner(q, k, v, causal=causal, scale=scale)


class LazyVirtual(VirtualTransport):
    def _exchange(
        self, sends: Sequence[Message], recvs: Sequence[Message], kind: str, step: str, channel: str
    ) -> Handle:
        if kind == "passing":
            return MovesInWait(self, sends, recvs, step, None)
        return VirtualTransport._relay(self, sends, recvs, kind, step, None)

    def _relay(
        self, sends: Sequence[Message], recvs: Sequence[Message], kind: str, step: str, forward_to: int | None
    ) -> Handle:
        VirtualTransport._relay(self, sends, [], kind, step, None)
        return MovesInWait(self, [], recvs, step, forward_to)


def virtual_events(hosts: int, name: str = "apb", select: str = "query", lazy: bool = False) -> list[Event]:
    """Prefill on virtual hosts and return every rank's communication events and kernel calls in one order."""
    events: list[Event] = []
    observers = [lambda e, s, p, r=r: events.append((r, e, s, p)) for r in range(hosts)]
    engine = tiny_engine(tiny_llama(torch.float32), strategy(name), hosts, select, observers=observers)
    for rank, host in enumerate(engine.cluster._hosts):
        host.kernel = Logged(host.kernel, lambda kind, rows, r=rank: events.append((r, "attend", kind, rows)))
    if lazy:
        world = engine.cluster.world
        for host, old in zip(engine.cluster._hosts, list(world.transports), strict=True):
            made = LazyVirtual(old.rank, world, observer=old.observer)
            world.transports[old.rank] = host.transport = made
    engine.prefill(make_prompt(CONTEXT))
    return events


def check_events(events: list[Event], hosts: int) -> None:
    for layer in range(LAYERS):
        mine = [e for e in events if e[2] == f"layer {layer}: passing"]
        for rank in range(hosts):
            kinds = [kind for r, kind, _, _ in mine if r == rank]
            assert kinds == ["post"] + ["arrive"] * rank + ["wait"]
        arrivals = [i for i, e in enumerate(mine) if e[1] == "arrive"]
        waits = [i for i, e in enumerate(mine) if e[1] == "wait"]
        assert len(arrivals) == hosts * (hosts - 1) // 2
        assert max(arrivals) < min(waits), "a block was still under way when a rank waited"


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_every_hop_is_done_before_any_virtual_host_waits(hosts: int) -> None:
    check_events(virtual_events(hosts), hosts)


@pytest.mark.parametrize("hosts", [3, 4])
def test_the_check_finds_blocks_that_are_forwarded_only_in_wait(hosts: int) -> None:
    events = virtual_events(hosts, lazy=True)
    with pytest.raises(AssertionError):
        check_events(events, hosts)


# -- agreeing before the first send ---------------------------------------------------------------------


def changed(request: PrefillRequest, what: str) -> PrefillRequest:
    if what == "compressor's option":
        return dataclasses.replace(request, compressor=compressor("query", window=3))
    if what == "question":
        return dataclasses.replace(request, query_ids=(*request.query_ids[:-1], 7))
    if what == "number of question tokens":
        return dataclasses.replace(request, query_ids=request.query_ids[:-1])
    if what == "question's place":
        return dataclasses.replace(request, question_delta=request.question_delta + 1)
    if what == "passing":
        prompt, plan = make_prompt(CONTEXT), request.plan
        other = strategy("apb", passing="allgather").plan(prompt.lengths, plan.hosts, plan.shape, compressor("query"))
        return dataclasses.replace(request, plan=other)
    assert what == "handle"
    return dataclasses.replace(request, handle="b")


@pytest.mark.parametrize(
    "what",
    ["compressor's option", "question", "number of question tokens", "question's place", "passing", "handle"],
)
def test_hosts_that_differ_raise_before_anything_else_is_sent(what: str) -> None:
    made = requests(make_prompt(CONTEXT), plan_for(3), with_question=True)
    made[2] = changed(made[2], what)
    world = VirtualWorld(3)
    with pytest.raises(HostFailure, match=r"hosts \[2\] hold another plan"):
        world.run(
            lambda t: Host(HostSpec("tiny", "float32", "cpu"), t, tiny_llama(torch.float32)).prefill(made[t.rank])
        )
    assert all(t.ledger.by_kind() == {"agree": 64} for t in world.transports)


def test_a_host_with_another_model_raises_before_anything_else_is_sent() -> None:
    made = requests(make_prompt(CONTEXT), plan_for(2), with_question=True)
    dtypes = (torch.float32, torch.float64)
    world = VirtualWorld(2)
    with pytest.raises(HostFailure, match="hold another plan"):
        world.run(lambda t: Host(HostSpec("t", "auto", "cpu"), t, tiny_llama(dtypes[t.rank])).prefill(made[t.rank]))


# -- processes ------------------------------------------------------------------------------------------


class Delayed(ProcessGroupTransport):
    """Every hop takes longer."""

    def arrived(self, message: Message, step: str) -> None:
        time.sleep(HOP_S)
        super().arrived(message, step)


class _LazyRelay(RelayHandle):
    """Blocks arrive by themselves, but go on only once the caller waits."""

    def _forward(self, message: Message) -> None:
        self._late = [*getattr(self, "_late", []), message]

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        for message in getattr(self, "_late", []):
            super()._forward(message)
        super().wait()


class LazyDelayed(Delayed):
    def _relay(
        self, sends: Sequence[Message], recvs: Sequence[Message], kind: str, step: str, forward_to: int | None
    ) -> Handle:
        return _LazyRelay(self, sends, recvs, kind, step, forward_to)


class Patient:
    """A kernel whose causal call on the block ends only when every rank has seen all its arrivals.

    Were blocks forwarded in wait() alone, a later rank would wait here for a rank that waits here.
    """

    name = "patient"

    def __init__(self, inner: Kernel, me: Rank, block_len: int, arrived: Callable[[], int], deadline_s: float):
        self._inner, self._me, self._block_len = inner, me, block_len
        self._arrived, self._deadline_s, self.calls = arrived, deadline_s, 0

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        if causal and q.shape[2] == self._block_len:
            self.calls += 1
            deadline = time.monotonic() + self._deadline_s
            while self._arrived() < self.calls * self._me.index and time.monotonic() < deadline:
                time.sleep(0.001)
            try:
                assert self._arrived() == self.calls * self._me.index, (
                    f"rank {self._me.index} saw {self._arrived()} arrivals in {self.calls} layers"
                )
            except AssertionError:
                self._me.barrier.abort()
                raise
            self._me.barrier.wait(self._deadline_s)
        return self._inner(q, k, v, causal=causal, scale=scale)


def plan_for(hosts: int) -> PrefillPlan:
    lengths, shape = make_prompt(CONTEXT).lengths, tiny_llama(torch.float32).shape
    return strategy("apb").plan(lengths, hosts, shape, compressor("query"))


def requests(prompt: Prompt, plan: PrefillPlan, with_question: bool = False) -> list[PrefillRequest]:
    """Return what the engine would hand to each host, if asked without the query phase."""
    engine = tiny_engine(tiny_llama(torch.float32), strategy("apb"), plan.hosts, "query")
    made = [prefill_request("a", prompt, plan, engine.setup.compressor, rank) for rank in range(plan.hosts)]
    return made if with_question else [dataclasses.replace(r, query_ids=()) for r in made]


def prefill_patiently(
    me: Rank, kind: type[ProcessGroupTransport], request: list[PrefillRequest], deadline_s: float
) -> dict[str, Any]:
    """Prefill on one process with a slow transport and a patient kernel; returns what it saw."""
    events: list[tuple[str, str]] = []
    t = kind(timeout_s=30.0, observer=lambda event, step, peer: events.append((event, step)))
    mine = request[me.index]
    host = Host(HostSpec("tiny", "float32", "cpu"), t, tiny_llama(torch.float32))
    block_len = mine.plan.host_plans[me.index].block_len
    host.kernel = Patient(host.kernel, me, block_len, lambda: sum(event == "arrive" for event, _ in events), deadline_s)
    complaint = None
    try:
        report = host.prefill(mine)
        passed = report.bytes_by_kind.get("passing", 0)
        cache = host._caches["a"].layers[-1].context
        kv = torch.stack([cache.k_BKTD, cache.v_BKTE])
        return {
            "events": events,
            "passed": passed,
            "kv": kv.numpy(),
            "calls": host.kernel.calls,
            "complaint": None,
        }
    except Exception as error:
        complaint = f"{type(error).__name__}: {error}"
    return {"events": events, "complaint": complaint}


def delayed(me: Rank, made: list[PrefillRequest]) -> dict[str, Any]:
    return prefill_patiently(me, Delayed, made, 10.0)


@pytest.mark.parametrize("world", [2, 4])
def test_every_hop_is_done_while_the_block_is_computed(world: int) -> None:
    prompt = make_prompt(CONTEXT)
    plan = plan_for(world)
    made = requests(prompt, plan)
    answers, want = on_both(world, delayed, virtual_kv, made)
    for rank, answer in enumerate(answers):
        assert answer["complaint"] is None
        assert answer["calls"] == LAYERS
        assert answer["passed"] == passing_bytes(plan, rank)
        for layer in range(LAYERS):
            mine = [event for event, step in answer["events"] if step == f"layer {layer}: passing"]
            assert mine == ["post"] + ["arrive"] * rank + ["wait"]
        torch.testing.assert_close(torch.from_numpy(answer["kv"]), want[rank], atol=1e-5, rtol=1e-5)


def virtual_kv(t: Any, made: list[PrefillRequest]) -> Tensor:
    host = Host(HostSpec("tiny", "float32", "cpu"), t, tiny_llama(torch.float32))
    host.prefill(made[t.rank])
    cache = host._caches["a"].layers[-1].context
    return torch.stack([cache.k_BKTD, cache.v_BKTE])


def test_the_patient_kernel_finds_blocks_that_are_forwarded_only_in_wait() -> None:
    prompt = make_prompt(CONTEXT)
    plan = plan_for(4)
    pool = Pool(4)
    try:
        answers = pool.run(prefill_patiently, LazyDelayed, requests(prompt, plan), 1.0)
    finally:
        pool.close()
    complaints = [answer["complaint"] for answer in answers]
    assert any("AssertionError: rank 2 saw 1 arrivals in 1 layers" in str(c) for c in complaints[2:]), complaints
