"""Summary of samples: means, the chosen compressor, and the stated comparisons with their corrections."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from bench.ruler.stats import holm, interval, sign_flip
from bench.ruler.variant import FULL, FULL_FIRST

Row = Mapping[str, Any]
CHOOSE, REPORT = "choose", "report"
_PAIR = ("model", "dtype", "task", "tokens", "seeds", "index")
_LINE = ("model", "dtype", "tokens", "seeds", "task", "variant")


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, oldest first; of a sample that was measured again with decoding, the later one."""
    return list({(row["model"], row["dtype"], row["variant"], row["index"]): row for row in rows}.values())


def table(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return one line a variant, task, length, seed set and dtype: means over its samples, with 95% intervals.

    ``flops_share`` is the busiest host's prefill over full attention's, ``less_full`` the mean difference of
    log-probabilities from full attention's, both over the samples that full attention has, too; ``perplexity`` is of
    the answer's tokens.
    """
    full = _paired(r for r in rows if r["variant"] == FULL)
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in _LINE)].append(row)
    out = []
    for group, found in groups.items():
        both = [(r, full[_pair(r)]) for r in found if _pair(r) in full]
        line: dict[str, Any] = dict(zip(_LINE, group, strict=True))
        line |= {"samples": len(found), "flops_share": None, "less_full": None}
        if both:
            line["flops_share"] = fmean(max(r["prefill_flops"]) / max(f["prefill_flops"]) for r, f in both)
            line["less_full"] = fmean(r["log_prob"] - f["log_prob"] for r, f in both)
        line |= {name: fmean(r[name] for r in found) for name in ("passing_bytes", "sent_bytes")}
        for name in ("log_prob", "kl", "accuracy", "second_log_prob", "second_accuracy"):
            values = [r[name] for r in found if r.get(name) is not None]
            line[name] = fmean(values) if values else None
            line[f"{name}_interval"] = interval(values) if values else None
        line["perplexity"] = math.exp(-line["log_prob"]) if line["task"] == "perplexity" else None
        out.append(line)
    return out


def chosen(rows: Iterable[Row]) -> dict[tuple[Any, ...], str]:
    """Return by model, length and strategy the compressor with the highest log-probability, tasks weighing alike, on
    the choosing seeds' samples that all candidates have. Random passing is no candidate, and one alone is no choice."""
    found: dict[tuple[Any, ...], dict[str, dict[tuple[Any, ...], Row]]] = {}
    for r in rows:
        if r["seeds"] == CHOOSE and r["compressor"] is not None and not r["random"]:
            candidates = found.setdefault((r["model"], r["tokens"], r["base"]), {})
            candidates.setdefault(r["compressor"], {})[_pair(r)] = r
    out = {}
    for group, candidates in found.items():
        shared = set.intersection(*(set(samples) for samples in candidates.values()))
        if shared and len(candidates) > 1:
            out[group] = max(candidates, key=partial(_likelihood, candidates, shared))
    return out


def _likelihood(
    candidates: Mapping[str, Mapping[tuple[Any, ...], Row]], shared: Iterable[tuple[Any, ...]], name: str
) -> float:
    by_task: dict[str, list[float]] = defaultdict(list)
    for pair in shared:
        row = candidates[name][pair]
        by_task[row["task"]].append(row["log_prob"])
    return fmean(fmean(values) for values in by_task.values())


def comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the stated comparisons on the reporting seeds, by log-probability, paired by sample.

    Each approximate variant stands against full attention, full attention with the question first, its own strategy
    with random passing, and star on as many hosts (with the question first as well, where the variant has it there).
    Where a compressor was chosen on other seeds, only the chosen one is compared, at other costs as well. ``p`` is
    one-sided for "better than", ``p_holm`` corrected for all comparisons returned.
    """
    picked = chosen(rows)
    groups: dict[tuple[Any, ...], dict[str, dict[tuple[Any, ...], Row]]] = {}
    for row in rows:
        if row["seeds"] == REPORT:
            group = groups.setdefault(tuple(row[name] for name in ("model", "dtype", "tokens", "task")), {})
            group.setdefault(row["variant"], {})[_pair(row)] = row
    found = []
    for (model, dtype, tokens, task), variants in groups.items():
        for variant, mine in variants.items():
            one = next(iter(mine.values()))
            choice = picked.get((model, tokens, one["base"])) or picked.get((model, tokens, _at_own_cost(one["base"])))
            if one["hosts"] == 1 or (choice and one["compressor"] != choice) or one["random"]:
                continue
            for other in _others(one, variants):
                line = _compare(mine, variants[other])
                if line:
                    found.append(
                        {"dtype": dtype, "tokens": tokens, "task": task, "variant": variant, "against": other} | line
                    )
    for line, p in zip(found, holm([line["p"] for line in found]), strict=True):
        line["p_holm"] = p
    return found


def _at_own_cost(base: str) -> str:
    """A label without the cost that its lengths were fitted to, which does not change the choice of a compressor."""
    return ", ".join(part for part in base.split(", ") if not part.startswith("at "))


def _others(one: Row, variants: Mapping[str, Mapping[tuple[Any, ...], Row]]) -> list[str]:
    """The variants that ``one`` is compared with, as far as they were measured."""
    out = [name for name in (FULL, FULL_FIRST) if name in variants]
    for name, theirs in variants.items():
        other = next(iter(theirs.values()))
        same_base = other["base"] == one["base"]
        star = other["strategy"] == "star" and other["hosts"] == one["hosts"] and one["strategy"] != "star"
        if (other["random"] and same_base and name != one["variant"]) or (
            star and other["question_first"] in (False, one["question_first"])
        ):
            out.append(name)
    return out


def _compare(mine: Mapping[tuple[Any, ...], Row], theirs: Mapping[tuple[Any, ...], Row]) -> dict[str, Any] | None:
    both = [pair for pair in mine if pair in theirs]
    if len(both) < 2:
        return None
    differences = [mine[p]["log_prob"] - theirs[p]["log_prob"] for p in both]
    flops = [max(mine[p]["prefill_flops"]) / max(theirs[p]["prefill_flops"]) for p in both]
    return {
        "samples": len(both),
        "difference": fmean(differences),
        "interval": interval(differences),
        "p": sign_flip(differences),
        "flops_ratio": fmean(flops),
    }


def _paired(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    return {_pair(r): r for r in rows}


def _pair(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in _PAIR)
