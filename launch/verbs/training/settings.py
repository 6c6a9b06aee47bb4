"""Settings of the trainings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from burst.registry import option
from launch.config.fields import choice


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What every training has."""

    model: str = choice("model", "smollm2-135m")
    dtype: str = option(
        "bfloat16",
        "of the frozen model: float32, bfloat16, float16 or float64; labels need no more than bfloat16",
    )
    device: str = option("auto", "cpu, cuda or cuda:N; auto: the GPU where there is one")
    threads: int = option(1, "CPU threads; more than are idle are many times slower")
    seed: int = option(0, "same seed, same heads")
    out: str | None = option(
        None, "folder for work in progress, result and log; null: one in the cache, by the settings", text=True
    )


@dataclass(frozen=True, kw_only=True)
class RetainingSettings(TrainSettings):
    """Settings of ``apb train retaining_heads``."""

    method: Literal["mlp", "ridge"] = option("mlp", "mlp: a small network a layer; ridge: a linear map in closed form")
    hidden: int = option(128, "hidden width of the network")
    prompts: int = option(800, "prompts to label; more of them help most")
    held_out: int = option(30, "prompts of other seeds that recall is measured on")
    shortest: int = option(400, "shortest document of a prompt, in tokens")
    longest: int = option(1600, "longest document of a prompt, in tokens")
    keep: int = option(160, "tokens of every prompt that are kept for fitting")
    epochs: int = option(10, "passes over the kept tokens")
    lr: float = option(0.001, "highest learning rate")


@dataclass(frozen=True, kw_only=True)
class EagleSettings(TrainSettings):
    """Settings of ``apb train eagle``."""

    prompts: int = option(4224, "questions that the model answers; more of them help most")
    held_out: int = option(40, "questions of each kind that accepted length is measured on")
    longest: int = option(160, "longest answer, in tokens")
    behind: int = option(
        0, "tokens of text, at most, that every second 128 questions stand behind: answers deep in long contexts"
    )
    start: str | None = option(
        None,
        "an EAGLE-1/2 head to train on from: a file, a published folder, or a shipped one's name; its window is not "
        "taken over",
        text=True,
    )
    window: int = option(512, "tokens that the head attends to")
    sinks: int = option(4, "first tokens that it always sees as well")
    epochs: int = option(5, "passes over the answers")
    batch: int = option(1536, "tokens of a step")
    lr: float = option(0.003, "highest learning rate")
    unrolled: float = option(0.35, "share of the steps in which the head goes on from its own features")
    depth: int = option(3, "how many steps it does")


@dataclass(frozen=True, kw_only=True)
class FrequencySettings(TrainSettings):
    """Settings of ``apb train frequency``."""

    vocab: tuple[int, ...] = option((8192, 16384), "sizes of the lists to write")
