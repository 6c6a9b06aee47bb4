"""One way to prefill that is compared with others: strategy, compressor, hosts, and where the question stands."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from apb.compress import Compressor
from apb.engine.setup import Setup
from apb.plan.flops import critical_flops
from apb.plan.shapes import PromptLengths
from apb.prompt.prompt import Prompt
from apb.strategies import STRATEGIES, Strategy
from bench.ruler.base import RulerSample
from bench.ruler.budget import fit
from bench.ruler.prompts import prompt
from burst.errors import UserError, choose

FULL, FULL_FIRST = "full", "full, question first"


@dataclass(frozen=True)
class Variant:
    """``model`` is what rows call it. ``plain``: the prefill does not know the question, which is asked afterwards.
    ``flops``: a strategy's name or a share of full attention; ``sent``: bytes; both fit lengths to each prompt."""

    model: str
    setup: Setup
    question_first: bool = False
    plain: bool = False
    flops: str | float | None = None
    sent: int | None = None

    @property
    def label(self) -> str:
        """The variant's name in rows and tables, with the options that are not the default's."""
        return self._label(self.compressor)

    @property
    def base(self) -> str:
        """The label without the compressor: what variants share that differ in it alone."""
        return self._label(None)

    @property
    def compressor(self) -> str | None:
        """The compressor's name, with the options that are not its default's."""
        return None if self.setup.compressor is None else _options(self.setup.compressor)

    def _label(self, scorer: str | None) -> str:
        s, parts = self.setup, [_options(self.setup.strategy)]
        if scorer is not None:
            parts.append(f" + {scorer}")
        if s.hosts > 1:
            parts.append(f", {s.hosts} hosts")
        if self.flops is not None:
            at = f"{self.flops}'s" if isinstance(self.flops, str) else f"{self.flops:g} of full's"
            parts.append(f", at {at} FLOPs")
        if self.sent is not None:
            parts.append(f", at {self.sent} bytes")
        if self.plain:
            parts.append(", question not known")
        return "".join(parts) + (", question first" if self.question_first else "")

    def takes(self, sample: RulerSample) -> bool:
        """Return True where the variant can be asked; a text that is continued has no question to put first."""
        return sample.chat or not self.question_first

    def prompt(self, sample: RulerSample) -> Prompt:
        """Return what is prefilled of a sample."""
        made = prompt(self.setup.tokenizer, sample, question_first=self.question_first)
        return dataclasses.replace(made, question=None) if self.plain else made

    @property
    def random(self) -> bool:
        """True where random rows are passed: the floor that every compressor must beat."""
        return self.setup.compressor is not None and self.setup.compressor.name == "random"

    def fitted(self, lengths: PromptLengths) -> Setup:
        """Return the setup for a prompt of these lengths. Raises UserError when the cost cannot be met."""
        if self.flops is None and self.sent is None:
            return self.setup
        return dataclasses.replace(
            self.setup, strategy=fit(self.setup, lengths, flops=self._budget(lengths), sent=self.sent)
        )

    def _budget(self, lengths: PromptLengths) -> int | None:
        if self.flops is None:
            return None
        if isinstance(self.flops, float):
            if not 0 < self.flops <= 1:
                raise UserError(
                    "no such share of full attention's FLOPs",
                    given=f"bench.flops={self.flops}",
                    allowed="more than 0, at most 1, or a strategy's name",
                    remedy="Write bench.flops=0.1, for example.",
                )
            return int(self.flops * critical_flops(self._other("full").plan(lengths, 1, self.setup.shape)))
        other = self.setup.using(choose("strategy", self.flops, STRATEGIES), hosts=self.setup.hosts)
        return critical_flops(other.strategy.plan(lengths, self.setup.hosts, self.setup.shape, other.compressor))

    def _other(self, name: str) -> Strategy:
        return self.setup.using(name, hosts=1).strategy


def baselines(asked: Variant) -> list[Variant]:
    """Return full attention, full attention with the question first, and random passing at the same cost."""
    full = asked.setup.using("full", hosts=1)
    found = [Variant(asked.model, full), Variant(asked.model, full, question_first=True)]
    if asked.setup.compressor is not None and not asked.random:
        from apb.compress import compressor

        found.append(
            dataclasses.replace(asked, setup=dataclasses.replace(asked.setup, compressor=compressor("random")))
        )
    return found


def _options(thing: Strategy | Compressor) -> str:
    """A strategy's or compressor's name, with the fields that differ from its defaults."""
    changed = [
        f"{f.name}={getattr(thing, f.name)}" for f in dataclasses.fields(thing) if getattr(thing, f.name) != f.default
    ]
    return f"{thing.name}({', '.join(changed)})" if changed else thing.name
