"""Things of the wrong kind that Python lets through: they are rejected, and nothing else is taken in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apb import Engine
from apb.compress.base import Candidates, Compressor
from apb.engine.setup import Setup
from apb.plan.plan import HostPlan, PrefillPlan
from apb.plan.shapes import ModelShape, PromptLengths
from apb.strategies import Strategy, strategy
from burst.errors import UserError
from tests.support.asking import HOSTS, engine, prompt
from tests.support.tiny import make_prompt, saved_llama, tiny_engine, tiny_llama


@pytest.mark.parametrize("model", [Path("/models/mine"), None, 5])
def test_what_is_no_name_does_not_become_the_default_model(model: Any) -> None:
    with pytest.raises(UserError, match="neither a name nor a Setup"):
        Engine.launch(model)


def test_an_empty_name_does_not_become_the_default_compressor(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown compressor ''"):
        Setup.make(saved_llama(tmp_path), compress="")


@pytest.mark.parametrize("ids", [[1.5, 2.5], torch.ones(3), ["1"]])
def test_numbers_that_are_not_whole_are_no_tokens(ids: Any) -> None:
    e = engine()
    with pytest.raises(UserError, match="neither text nor token ids"):
        e.prefill(ids, [1, 2])
    with pytest.raises(UserError, match="neither text nor token ids"):
        e.prefill(prompt()).fork(ids)


def test_another_engine_does_not_release_a_cache() -> None:
    mine, other = engine(), engine()
    handle = mine.prefill(prompt())
    with pytest.raises(UserError, match="another engine"):
        other.release(handle)
    assert not handle.released and mine.generate(handle, max_new_tokens=2).token_ids


def test_a_listener_that_fails_on_the_last_piece_leaves_the_cache_refused() -> None:
    e = engine()
    handle = e.prefill(prompt())
    told: list[str] = []
    text = e.generate(handle.fork(), max_new_tokens=6, on_token=told.append).text
    assert text == "".join(told)

    def fail(piece: str) -> None:
        told.remove(piece)
        if not told:
            raise OSError("the terminal is gone")

    broken = handle.fork()
    with pytest.raises(OSError):
        e.generate(broken, max_new_tokens=6, on_token=fail)
    with pytest.raises(UserError, match="interrupted"):
        e.generate(broken, max_new_tokens=1)


# -- plug-ins -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scores(Compressor):
    """Returns what it is told to."""

    name = "scores"
    make: Callable[[Tensor], Any] = lambda zeros: zeros

    def score(self, block: Candidates) -> Tensor:
        made: Tensor = self.make(torch.zeros(block.k_BKSD.shape[:3]))
        return made


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[..., :-1],
        lambda x: torch.cat([x, x], dim=-1),
        lambda x: x[:, :1],
        lambda x: x[0],
        lambda x: x.to(torch.complex64),
        lambda x: None,
    ],
)
def test_scores_of_another_shape_are_rejected(make: Callable[[Tensor], Any]) -> None:
    e = tiny_engine(tiny_llama(torch.float32), strategy("apb"), HOSTS, Scores(make))
    with pytest.raises(UserError, match="compressor 'scores' returns no score for each token"):
        e.prefill(make_prompt(90))


@dataclasses.dataclass(frozen=True)
class Gaps(Strategy):
    """Changes the plan of star."""

    name = "gaps"
    change: Callable[[tuple[HostPlan, ...]], tuple[HostPlan, ...]] = lambda hosts: hosts

    def plan(
        self, lengths: PromptLengths, hosts: int, shape: ModelShape, compressor: Compressor | None = None
    ) -> PrefillPlan:
        made = strategy("star").plan(lengths, hosts, shape)
        return dataclasses.replace(made, strategy=self.name, host_plans=self.change(made.host_plans))


def _last(start: int, stop: int) -> Callable[[tuple[HostPlan, ...]], tuple[HostPlan, ...]]:
    """Move the ends of the last host's block."""

    def change(hosts: tuple[HostPlan, ...]) -> tuple[HostPlan, ...]:
        last = hosts[-1]
        return (*hosts[:-1], dataclasses.replace(last, spans=((last.start + start, last.stop + stop),)))

    return change


@pytest.mark.parametrize("change", [_last(3, 0), _last(-3, 0), _last(0, 7), _last(0, -7), lambda hosts: hosts[:-1]])
def test_a_plan_with_gaps_is_rejected(change: Callable[[tuple[HostPlan, ...]], tuple[HostPlan, ...]]) -> None:
    e = tiny_engine(tiny_llama(torch.float32), Gaps(change), HOSTS)
    with pytest.raises(UserError, match="strategy 'gaps' does not spread the whole context"):
        e.prefill(make_prompt(90))
