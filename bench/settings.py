"""Settings of the benchmarks: every key below ``bench.``, its default and its help text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from apb.clusters import Launcher
from apb.compress import Compressor
from apb.costs.network import Network
from apb.engine.options import EngineOptions
from apb.strategies import Strategy
from burst.registry import option, same
from launch.config.fields import choice
from launch.config.settings import COMPRESS, DecodeSettings

EXACT_AND_APPROXIMATE = ("full", "ring", "star", "apb", "spava", "burst", "ulysses", "usp")
RATES = "a file of 'apb bench kernels' or 'apb bench emulate'; null: assumed for the machine"
NOTHING_RUNS = "nothing runs on it"


def _save(what: str) -> Any:
    return option(False, f"true: add the rows to bench/results/DATE-{what}.jsonl")


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Settings of ``apb bench attention``."""

    tokens: int = option(8192, "of the whole sequence")
    ranks: int = option(4, "all on one device, one after another")
    nodes: int = option(1, "machines that the communication is modelled for")
    q_heads: int = option(8, "query heads")
    kv_heads: int = option(2, "key and value heads")
    head_dim: int = option(64, "numbers a head")
    dtype: str = option("auto", "float32, bfloat16, float16 or float64; auto: bfloat16 on a GPU, float32 on a CPU")
    device: str = option("auto", "cpu or cuda; auto: the GPU where there is one")
    layout: str = option("zigzag", "who holds which tokens: zigzag, contiguous or striped")
    backward: bool = option(True, "measure forward and backward, else the forward alone")
    warmup: int = option(1, "rounds that are not counted")
    repeats: int = option(5, "rounds that are")
    error_tokens: int = option(2048, "at most so many tokens when errors against float64 are measured")
    save: bool = option(False, "true: keep the document as bench/results/DATE-attention.json")


@dataclass(frozen=True, kw_only=True)
class RunsModel:
    """Settings of every benchmark of a model's shape: the model, and the place of its computation."""

    model: str = choice("model", "smollm2-135m")
    dtype: str = same(EngineOptions, "dtype")
    device: str = same(EngineOptions, "device")


@dataclass(frozen=True, kw_only=True)
class RunsEngine(RunsModel):
    """Settings of every benchmark of an engine."""

    strategy: Strategy = choice("strategy", "apb")
    compress: Compressor | None = choice("compress", None, COMPRESS)
    cluster: Launcher = choice("cluster", "virtual")
    timeout_s: float = same(EngineOptions, "timeout_s")


@dataclass(frozen=True, kw_only=True)
class DecodeBench(RunsEngine):
    """Settings of ``apb bench decode``."""

    strategy: Strategy = choice("strategy", "full")
    decode: DecodeSettings = choice("decode", "eagle2")
    kinds: tuple[str, ...] = option(
        ("general", "math", "code"),
        "kinds of questions, none of which a shipped head was trained on; or free, written by hand",
    )
    contexts: tuple[int, ...] = option((0, 2000), "tokens of prose that stand before the question")
    prompts: int = option(8, "questions of each kind")
    new_tokens: int = option(64, "longest answer")
    sizes: tuple[int, ...] = option((4, 8, 16), "rows of trees and of chains that are compared; empty: none")
    data: str | None = option(
        None,
        "JSONL with a question or prompt in each line, such as GSM8K's and HumanEval's, instead of kinds",
        text=True,
    )
    save: bool = _save("decode")


@dataclass(frozen=True, kw_only=True)
class EmulateSettings(RunsModel):
    """Settings of ``apb bench emulate``."""

    compress: Compressor | None = choice("compress", None, COMPRESS)
    network: Network = choice("network", "flat")
    strategies: tuple[str, ...] = option(
        EXACT_AND_APPROXIMATE, "side by side, in turn; full on one host is the baseline"
    )
    hosts: int = option(8, "hosts of every strategy but full")
    tokens: int = option(7300, "whole prompt; random token ids")
    query_tokens: int = option(24, "of these, the question and its template")
    warmup_tokens: int = option(1000, "a first round with so short a prompt is not counted")
    repeats: int = option(3, "rounds that are counted")
    threads: int = option(1, "CPU threads")
    validate: bool = option(
        False,
        "instead: 2 or more gloo processes, each on a core of its own, beside what was predicted for them",
    )
    rates: str | None = option(
        None,
        "with validate: a file of 'apb bench kernels', whose rates the simulator is held against the processes with",
        text=True,
    )
    save: bool = _save("emulate")


@dataclass(frozen=True, kw_only=True)
class KernelSettings(RunsModel):
    """Settings of ``apb bench kernels``."""

    compress: Compressor = choice("compress", "query")
    tokens: tuple[int, ...] = option((64, 256, 1024, 4096), "lengths to measure at")
    question_tokens: int = option(16, "query tokens that score a block's rows")
    repeats: int = option(3, "timed calls of each, after one that is not counted")
    save: bool = _save("kernels")


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of ``apb bench report``."""

    model: str = choice("model", "llama3.1-8b-shape", "whose memory and bytes the growth table shows")
    results: str | None = option(None, "folder of DATE-*.jsonl and DATE-ruler; null: bench/results", text=True)
    readme: str | None = option(
        None,
        "file whose lines between <!-- results --> and <!-- /results --> are written anew; null: none",
        text=True,
    )
    figure: str | None = option(None, "file for the figure, .svg or .png; null: none", text=True)
    growth_hosts: tuple[int, ...] = option((8, 16, 32, 64), "host counts of the growth table")
    growth_block: int = option(16384, "context tokens a host in it")
    dtype: str = option("bfloat16", "of the growth table's model")
    device: str = option("cpu", NOTHING_RUNS)


@dataclass(frozen=True, kw_only=True)
class RulerSettings(RunsEngine):
    """Settings of ``apb bench ruler``."""

    tasks: tuple[str, ...] = option((), "a list such as [vt,cwe]; empty: all")
    tokens: int = option(2000, "whole prompt: template, document, question and the answer's beginning")
    samples: int = option(20, "of each task")
    seeds: Literal["report", "choose"] = option(
        "report",
        "report, or choose: other samples, on which a compressor is chosen by log-probability, without baselines",
    )
    decode: bool = option(True, "decode answers for their accuracy; false: log-probability and KL only")
    question_first: bool = option(False, "put the question before the document as well")
    plain: bool = option(False, "prefill without the question, and ask it afterwards: compressors that need none")
    flops: str | float | None = option(
        None,
        "stretch anchor and passing to a strategy's busiest host (star), or to this share of full attention's FLOPs",
    )
    bytes: int | None = option(None, "stretch passing to this many bytes sent by all hosts before the question")
    data: str | None = option(
        None, "RULER's own JSONL file, or a folder of them, instead of generated samples", text=True
    )


@dataclass(frozen=True, kw_only=True)
class SimulateSettings:
    """Settings of ``apb bench simulate``."""

    model: str = choice("model", "smollm2-135m")
    compress: Compressor | None = choice("compress", None, COMPRESS)
    network: Network = choice("network", "nvlink")
    strategies: tuple[str, ...] = option(
        ("full", "ring", "burst", "allgather", "ulysses", "usp", "star", "apb", "spava"), "strategies side by side"
    )
    hosts: tuple[int, ...] = option((8,), "such as [8,64,1024]")
    tokens: tuple[int, ...] = option((131072,), "whole prompts, such as [32768,131072,1048576]")
    query_tokens: int = option(64, "of these, the question and its template")
    rates: str | None = option(None, RATES, text=True)
    machine: str = option("cuda", "speeds to assume without rates: cpu or cuda")
    memory_gb: float | None = option(
        None,
        "memory of a host's device in GB (10^9 bytes); what needs more is said not to fit; null: any",
    )
    dtype: str = option("bfloat16", "float32, bfloat16, float16 or float64")
    device: str = option("cpu", NOTHING_RUNS)
    save: bool = _save("simulate")


@dataclass(frozen=True, kw_only=True)
class ThroughputSettings(RunsEngine):
    """Settings of ``apb bench throughput``."""

    tokens: int = option(4096, "whole prompt, at most: text is cut where its tokens fit")
    query_tokens: int = option(24, "of these, the question and its template; with random weights only")
    new_tokens: int = option(16, "decoded tokens, stop tokens or not")
    warmup: int = option(1, "prefills that are not counted")
    repeats: int = option(3, "that are; each is a row, and rows in out=DIR are not measured again")
    save: bool = _save("throughput")
