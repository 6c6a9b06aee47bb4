"""Typed data as bytes: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

import dataclasses
import math
import pickle
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.clusters.codec import Codec, Malformed
from apb.clusters.outcome import Outcome
from apb.compress.base import COMPRESSORS, Compressor
from apb.decode import decoder
from apb.decode.base import DECODERS, DecodeRequest
from apb.decode.sampling import Sampling
from apb.draft.spec import DraftSpec
from apb.engine.requests import prefill_request
from apb.host.messages import HostSpec
from apb.layers.full import Full
from apb.layers.latent import Latent
from apb.layers.linear import Linear
from apb.layers.window import Window
from apb.strategies import STRATEGIES
from burst.errors import HostFailure, UserError
from launch.torchrun.messages import Call, Do, Done, Start, codec
from tests.support.asking import engine, ids, prompt

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.lists(st.integers(-(2**64), 2**64), min_size=30, max_size=40).map(tuple)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(plain)
def test_plain_values_come_out_as_they_went_in(value: Any) -> None:
    found = codec().decode(codec().encode(value))
    assert found == value and repr(found) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5)])
def test_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    found = codec().decode(codec().encode((tensor, [math.inf, -math.inf])))
    assert found[0].dtype == dtype and torch.equal(found[0], tensor) and found[1] == [math.inf, -math.inf]
    assert math.isnan(codec().decode(codec().encode(math.nan)))


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_every_strategys_requests(name: str) -> None:
    e = engine(1 if name == "full" else 4, name)
    asked = prompt()
    plan = e.setup.plan(asked)
    for rank in range(plan.hosts):
        do = Do(3, Call("prefill", (prefill_request("cache-0", asked, plan, e.setup.compressor, rank),)))
        assert codec().decode(codec().encode(do)) == do


def test_what_hosts_answer() -> None:
    e = engine()
    handle = e.prefill(prompt(), chat=False)
    request = DecodeRequest(decoder("lookup"), 5, history=torch.tensor(handle.token_ids))
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("logits", (handle.id,)),
        ("score", (handle.id, ids(5, 1), 2)),
        ("links", ()),
        ("available", ()),
        ("generate", (handle.id, request)),
    ]
    for method, args in calls:
        for value in e.cluster.call(method, [args] * 4):
            found = codec().decode(codec().encode(Done(1, Outcome(value)))).outcome.value
            assert type(found) is type(value) and repr(found) == repr(value)


@pytest.mark.parametrize("name", DECODERS.names())
def test_every_decoders_requests(name: str) -> None:
    history = torch.arange(50)
    request = DecodeRequest(decoder(name), 7, Sampling(0.5, 0.9, 3, 1), (2, 3), ("stop",), history=history)
    found = codec().decode(codec().encode(request))
    assert found == request and torch.equal(found.history, history)


def test_how_hosts_start() -> None:
    spec = HostSpec("model", "float32", "cpu", draft=DraftSpec("smollm2-135m"), config={"layers": [1, 2.5, None]})
    start = Start(spec, (0, 0, 1), 2, 4711)
    assert codec().decode(codec().encode(start)) == start


def test_plug_ins_travel_by_their_names() -> None:
    class Unknown(Compressor):
        name = "unknown"

        def score(self, candidates: Any) -> Any:
            raise NotImplementedError

    @COMPRESSORS.register("foreign", "of another package")
    @dataclasses.dataclass(frozen=True)
    class Foreign(Compressor):
        share: float = 0.5

        def score(self, candidates: Any) -> Any:
            raise NotImplementedError

    try:
        made: Any = Foreign(share=0.25)
        found = codec().decode(codec().encode(made))
        assert type(found) is Foreign and found == made
        for stranger in (Unknown, type("Foreign", (Foreign,), {})):
            with pytest.raises(UserError, match="registered under no name"):
                codec().encode(stranger())
    finally:
        del COMPRESSORS._found["foreign"], COMPRESSORS._summaries["foreign"]


def test_errors() -> None:
    mistake = UserError("m", given=(1, 2), allowed=3, remedy="r")
    for error in (mistake, HostFailure("h", rank=1, step="s", peer=None), IndexError("i"), KeyError("k")):
        error.add_note("seen there")
        found = codec().decode(codec().encode(Outcome(error=error))).error
        assert type(found) is type(error) and found.__notes__ == ["seen there"]
        assert str(found) == str(error)

    class Odd(Exception):
        pass

    found = codec().decode(codec().encode(Odd("what happened")))
    assert type(found) is RuntimeError and str(found) == "Odd: what happened"


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it ran",))


@pytest.mark.parametrize(
    "head",
    [
        "[[1],[]]",
        '[{"class":["os.system",{}]},[]]',
        '[{"class":["Do",{"number":1}]},[]]',
        '[{"plugin":["compressor","os",{}]},[]]',
        '[{"plugin":["shell","norm",{}]},[]]',
        '[{"error":["SystemExit",["x"],[]]},[]]',
        '[{"error":["eval",["x"],[]]},[]]',
        '[{"tensor":["float32",[1000000000],0]},[0]]',
        '[{"tensor":["float32",[-1,-1],0]},[4]]',
        '[{"run":["tuple",7]},[]]',
        '[{"float":[]},[]]',
        '[{"tuple":1,"list":2},[]]',
        "[null,[1000000000000]]",
        "[" * 5000,
    ],
)
def test_what_is_not_ours_is_malformed(head: str) -> None:
    data = head.encode()
    with pytest.raises(Malformed):
        codec().decode(struct.pack("<I", len(data)) + data)


def test_pickles_and_cut_messages_are_malformed() -> None:
    whole = codec().encode((torch.ones(3), tuple(range(99))))
    for data in (b"", pickle.dumps(Bomb()), *(whole[:n] for n in range(len(whole))), whole + b"x"):
        with pytest.raises(Malformed):
            codec().decode(data)


def test_only_its_own_classes() -> None:
    with pytest.raises((AssertionError, UserError)):
        Codec((), ()).encode(Sampling())
    with pytest.raises(AssertionError, match="does not travel"):
        codec().encode(Bomb())
    assert ids(1, 1)


def test_layers_of_every_kind_travel_with_plans() -> None:
    cap = Window(4, 2, 16, 12, sink=True, soft_cap=2.0, window=8, chunked=True)
    for layer in (
        Full(4, 2, 16, 16, reads=1),
        cap,
        Latent(4, 16, 8, 24, 12),
        Linear("kda", 96, 4, 2, 4, 16, 16, scan="gather"),
    ):
        assert codec().decode(codec().encode(layer)) == layer
