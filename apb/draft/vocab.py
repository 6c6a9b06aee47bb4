"""Draft vocabularies: the target's most frequent tokens, and those with a prompt's own tokens among them.

Source: FR-Spec (arXiv 2502.14856), whose file format is read and written; the adaptive set is ours.
Shapes: W whole vocabulary, V draft vocabulary, S prompt tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from burst.errors import UserError

_KEY = "ids"


def count(texts: Iterable[Tensor], vocab: int) -> Tensor:
    """Return how often each id occurs (W,), int64, in texts of ids."""
    counts_W = torch.zeros(vocab, dtype=torch.int64)
    for ids_S in texts:
        counts_W += torch.bincount(ids_S.long(), minlength=vocab)
    return counts_W


def rank(counts_W: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """Return all ids (W,), int64, most frequent first; stop tokens stand before all, ties go to the smaller id.

    A head that cannot draft the end of an answer would miss it every time, and plain text has no end of turn.
    """
    counts_W = counts_W.clone()
    counts_W[list(stop_ids)] += counts_W.sum() + 1
    return counts_W.argsort(descending=True, stable=True)


def coverage(counts_W: Tensor, ids_V: Tensor) -> float:
    """Return the share of counted tokens that a draft vocabulary has."""
    return float(counts_W[ids_V].sum()) / max(1, int(counts_W.sum()))


def check(ids_V: Tensor, vocab: int, stop_ids: Sequence[int], source: str) -> Tensor:
    """Return ``ids_V`` as it is; raises UserError for no ids, repeated ones, ids out of range or a missing stop token.

    ``source`` names the list in the message.
    """
    wrong = ids_V[(ids_V < 0) | (ids_V >= vocab)]
    missing = [i for i in stop_ids if not bool((ids_V == i).any())]
    values, times = ids_V.unique(return_counts=True)
    if not len(ids_V):
        problem = ("is empty", "no ids")
    elif len(wrong):
        problem = ("holds ids that the model has not", f"id {int(wrong[0])}")
    elif int(times.max()) > 1:
        problem = ("holds an id twice", f"id {int(values[times.argmax()])}")
    elif missing:
        problem = ("lacks a stop token: no answer's end could be drafted", f"id {missing[0]} is absent")
    else:
        return ids_V
    raise UserError(
        f"the frequency list {source} {problem[0]}",
        given=problem[1],
        allowed=f"ids of 0 to {vocab - 1}, each once, with the stop tokens {', '.join(map(str, stop_ids)) or '(none)'}",
        remedy="Make the list for this model: apb train frequency model=...",
    )


def bitmap(ids: Tensor | Sequence[int], vocab: int) -> Tensor:
    """Return which ids occur, one bit each (ceil(W / 8),), uint8: hosts join theirs by a bitwise or."""
    seen = torch.zeros(-(-vocab // 8) * 8, dtype=torch.uint8)
    seen[torch.as_tensor(ids, dtype=torch.int64).cpu()] = 1
    weights = (1 << torch.arange(8)).to(torch.uint8)
    return (seen.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def from_bitmap(bits: Tensor, vocab: int) -> Tensor:
    """Return the ids that a bitmap holds, ascending, int64."""
    seen = (bits.cpu()[:, None] >> torch.arange(8).to(torch.uint8)) & 1
    return seen.flatten()[:vocab].nonzero()[:, 0]


def adapt(ranked_V: Tensor, bits: Tensor, size: int, vocab: int, stop_ids: Sequence[int]) -> Tensor:
    """Return ``size`` ids (V,): those of the prompt, and the most frequent of the others in the rows that remain.

    ``ranked_V`` is ordered by frequency and at least ``size`` long. The least frequent ones make room for the prompt's;
    where these alone are too many, their most frequent are taken. Stop tokens are always among the result.
    """
    assert size <= len(ranked_V), (size, len(ranked_V))
    of_prompt = torch.zeros(vocab, dtype=torch.bool)
    of_prompt[from_bitmap(bits, vocab)] = True
    unranked = of_prompt.clone()
    unranked[ranked_V] = False
    ordered_W = torch.cat([ranked_V, unranked.nonzero()[:, 0]])  # ids that the list does not have are the rarest
    stops = torch.tensor(list(stop_ids), dtype=torch.int64)
    ordered_W = ordered_W[~torch.isin(ordered_W, stops)]
    wanted = of_prompt[ordered_W]
    first = torch.cat([stops, ordered_W[wanted]])[:size]
    rest = ordered_W[~wanted][: size - len(first)]
    return torch.cat([first, rest])


def save(file: Path, ids_V: Tensor) -> None:
    """Write a list, most frequent first: in safetensors, or as the published ``.pt`` list; whole or not at all."""
    unfinished = file.with_suffix(".part")
    if file.suffix == ".pt":
        torch.save(ids_V.tolist(), unfinished)
    else:
        save_file({_KEY: ids_V.to(torch.int32)}, unfinished)
    unfinished.chmod(0o644)
    os.replace(unfinished, file)


def load(file: Path, vocab: int, stop_ids: Sequence[int]) -> Tensor:
    """Return a list of ids (V,), int64, most frequent first; raises UserError for a file that is none, and as check."""
    try:
        if file.suffix == ".safetensors":
            found: object = load_file(file).get(_KEY)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise _damaged(file, f"cannot be read ({error})") from error
    except Exception as error:  # unpickling fails in many ways, some by private types
        raise _damaged(file, f"is no plain list ({type(error).__name__})") from error
    if isinstance(found, list) and all(type(i) is int for i in found):
        found = torch.tensor(found, dtype=torch.int64)
    if not isinstance(found, Tensor) or found.dim() != 1 or found.is_floating_point() or found.dtype == torch.bool:
        raise _damaged(file, "is no list of token ids")
    return check(found.long(), vocab, stop_ids, str(file))


def _damaged(file: Path, what: str) -> UserError:
    return UserError(
        f"the frequency list {file} {what}",
        given=str(file),
        allowed="freq_V.pt as FR-Spec publishes it, or safetensors of 'apb train frequency'",
        remedy="Copy the file again, or make one: apb train frequency model=...",
    )
