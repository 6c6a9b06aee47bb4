"""Training of an EAGLE head: ask the frozen model, learn from its answers, measure the walk; every stage is resumed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from apb.draft import DraftHead, load, save, vocab
from apb.draft.eagle import EagleHead
from apb.models.adapter import Adapter
from apb.train import features
from apb.train.answers import FIRST
from apb.train.features import FeatureSample
from apb.train.folder import OnProgress, claim
from apb.train.interview import Interview
from apb.train.questions import KINDS, Questions
from apb.train.tutor import Tutor, TutorRecipe
from apb.train.walk import TreeSize, accepted_length, walk
from burst.errors import in_range

_SAMPLES, _HELD_OUT, _CHECKPOINT, _UNMEASURED = "samples", "held_out", "checkpoint.pt", "unmeasured.safetensors"
HEAD, RANKED, ANSWERS = "head.safetensors", "head.freq.safetensors", "answers.safetensors"
_AT_ONCE = 128  # prompts that are answered at once, and kept in one file; half as many with a passage of text
_TURNS = ("general", "code", "math", "general", "code", "math", "general", "code", "general", "code")
_TEXT_TURN = 12  # one file in so many is about passages of the text
_WARM, _WARM_TURN = 0.7, 3  # one answer in three is sampled at this temperature, the others are greedy
_BEHIND = " behind "  # in the names of sets
_LEAST_BEHIND = 0.25  # of ``behind``; lengths are uniform in their logarithm
_ROOM = 512  # tokens for a template and a question
_EVERY = 200  # steps between checkpoints
_GAP = 40  # training answers on which the gap to held-out ones is measured


@dataclass(frozen=True)
class EagleJob:
    """Inputs of a training run. ``prompts`` and ``held_out`` (of each kind) are counts, ``longest`` is an answer's
    length in tokens, ``behind`` the most tokens of text that every second file's questions stand behind; hashes stand
    for the text and for the head that training goes on from."""

    model: str
    text_sha256: str
    prompts: int = 4224
    held_out: int = 40
    longest: int = 160
    behind: int = 0
    start_sha256: str | None = None
    window: int = 512
    sinks: int = 4
    seed: int = 0
    dtype: str = "bfloat16"  # of the frozen model
    recipe: TutorRecipe = field(default_factory=TutorRecipe)

    def __post_init__(self) -> None:
        for key in ("prompts", "held_out"):
            in_range(key, getattr(self, key), getattr(self, key) >= 1, "1 or more")
        in_range("longest", self.longest, self.longest >= 8, "8 or more")
        in_range("behind", self.behind, self.behind >= 0, "0 or more")
        in_range("window", self.window, self.window >= 8, "8 or more")
        most = FIRST - 1 if self.behind else self.sinks  # a first token's row holds the next token, too
        in_range(
            "sinks", self.sinks, 0 <= self.sinks <= most, f"0 to {most} with behind" if self.behind else "0 or more"
        )
        in_range("seed", self.seed, self.seed >= 0, "0 or more")


@dataclass(frozen=True)
class TrainedEagle:
    """The head's file, its frequency list beside it, the answers' ids, and accepted lengths by prompts."""

    file: Path
    ranked: Path
    answers: Path
    accepted: dict[str, Any]


def train(
    job: EagleJob,
    adapter: Adapter,
    tokenizer: Any,
    stop_ids: Sequence[int],
    text: str,
    folder: Path,
    on_progress: OnProgress,
    start: EagleHead | None = None,
) -> TrainedEagle:
    """Train a head for the model behind ``adapter`` in ``folder``, from ``start`` on, and return the final files there.

    What is found in the folder is not done again: answers, and training up to its last checkpoint; a run that was
    killed ends with the weights of one that was not. Raises UserError when the folder is another job's, or when
    text or model's positions are not enough for ``behind``.
    """
    interview = Interview(adapter, tokenizer, stop_ids, job.longest)
    questions = Questions(text, job.seed)
    before = interview.encode(questions.text) if job.behind else ()
    room = max(0, min(len(before), adapter.shape.max_positions - job.longest - _ROOM))
    in_range("behind", job.behind, job.behind <= room, f"0 to {room}, by the text's tokens and the model's positions")
    claim(folder, asdict(job))
    files = _ask(job, interview, questions, before, folder / _SAMPLES, on_progress)
    passage = interview.encode(questions.held_out_text)[-job.behind :] if job.behind else ()
    held_out = _held_out(job, interview, questions, passage, folder / _HELD_OUT, on_progress)
    parts = [[s for s in features.read(file) if len(s.ids_S) > s.prompt + 1] for file in files]
    samples = [s for part in parts for s in part]
    whole = [s for number, part in enumerate(parts) if not _stands_behind(job, number) for s in part]
    ids = [answer_S for file in files for answer_S in features.read_ids(file)]
    counts_W = vocab.count(ids, adapter.shape.vocab)
    ranked_W = vocab.rank(counts_W, stop_ids)
    tutor = Tutor(job.recipe, adapter.draft_target(), samples, ranked_W, job.window, job.sinks, start)
    head = tutor.run(
        folder / _CHECKPOINT, _EVERY, lambda done, total, loss: on_progress("Training the head", done, total)
    )
    save(folder / _UNMEASURED, head, {})
    drafting = load(folder / _UNMEASURED, adapter.draft_target())  # in the model's type, as it will be used
    sets = {**held_out, "training": whole[:_GAP]} if whole else held_out
    accepted = _measured(drafting, ranked_W, sets, interview.hidden(passage, _kept(job)), stop_ids, on_progress)
    about = {"model": job.model, "job": json.dumps(asdict(job)), "accepted_length": json.dumps(accepted)}
    save_ids(folder / ANSWERS, ids)
    vocab.save(folder / RANKED, ranked_W)
    save(folder / HEAD, head, about)
    for name in (_SAMPLES, _HELD_OUT):
        shutil.rmtree(folder / name)
    for name in (_CHECKPOINT, _UNMEASURED):
        (folder / name).unlink()
    return TrainedEagle(folder / HEAD, folder / RANKED, folder / ANSWERS, accepted)


def finished(folder: Path, job: EagleJob) -> TrainedEagle | None:
    """Return what an earlier run of the same job left in the folder, if it ended."""
    if not (folder / HEAD).is_file():
        return None
    claim(folder, asdict(job))
    with safe_open(folder / HEAD, framework="pt") as opened:
        accepted = json.loads(opened.metadata()["accepted_length"])
    return TrainedEagle(folder / HEAD, folder / RANKED, folder / ANSWERS, accepted)


def save_ids(file: Path, ids: Sequence[Tensor]) -> None:
    """Write answers' token ids, one tensor an answer, for ``apb train frequency``; whole or not at all."""
    unfinished = file.with_suffix(".part")
    save_file({f"{number:06d}": ids_S.contiguous() for number, ids_S in enumerate(ids)}, unfinished)
    os.replace(unfinished, file)


def _ask(
    job: EagleJob,
    interview: Interview,
    questions: Questions,
    before: Sequence[int],
    folder: Path,
    on_progress: OnProgress,
) -> list[Path]:
    """Write what is missing of the answers and return all their files, in order."""
    folder.mkdir(exist_ok=True)
    plan = list(_plan(job.prompts))
    files = [folder / f"{number:05d}.safetensors" for number in range(len(plan))]
    for number, (file, (kinds, first)) in enumerate(zip(files, plan, strict=True)):
        if not file.exists():
            on_progress("Asking the model", number, len(plan))
            asked = [questions.question(first + i, kind) for i, kind in enumerate(kinds)]
            warm = [_WARM if i % _WARM_TURN == 2 else 0.0 for i in range(len(asked))]
            interview.write(file, asked, warm, number, _stretch(before, number, job))
    on_progress("Asking the model", len(plan), len(plan))
    return files


def _stands_behind(job: EagleJob, number: int) -> bool:
    """True where the questions of a file stand behind a long text."""
    return job.behind > 0 and number % 2 == 0


def _stretch(text: Sequence[int], number: int, job: EagleJob) -> Sequence[int]:
    """Return what the questions of a file stand behind: nothing, or between a quarter of the asked length and all."""
    if not _stands_behind(job, number):
        return ()
    rng = random.Random(f"behind {job.seed} {number}")
    size = int(job.behind * _LEAST_BEHIND ** rng.random())
    at = rng.randrange(len(text) - size + 1)
    return text[at : at + size]


def _plan(prompts: int) -> list[tuple[list[str], int]]:
    """Return for each file its questions' kinds and the number of the first."""
    plan: list[tuple[list[str], int]] = []
    left = prompts
    while left:
        text = len(plan) % _TEXT_TURN == _TEXT_TURN - 1
        size = min(left, _AT_ONCE // 2 if text else _AT_ONCE)
        plan.append((["text" if text else _TURNS[i % len(_TURNS)] for i in range(size)], len(plan) * _AT_ONCE))
        left -= size
    return plan


def _held_out(
    job: EagleJob,
    interview: Interview,
    questions: Questions,
    passage: Sequence[int],
    folder: Path,
    on_progress: OnProgress,
) -> dict[str, list[FeatureSample]]:
    """Return held-out answers by kind, greedy ones, sampled ones under ``KIND at 0.7``, and greedy ones to the same
    questions behind a long text under ``KIND behind N``."""
    folder.mkdir(exist_ok=True)
    asked = {kind: [questions.question(i, kind, held_out=True) for i in range(job.held_out)] for kind in KINDS}
    asked["free"] = questions.free()[: job.held_out]
    sets = {(f"{kind} at {t}" if t else kind): (asked[kind], t) for t in (0.0, _WARM) for kind in asked}
    out = {}
    for done, (name, (chosen, temperature)) in enumerate(sets.items()):
        on_progress("Asking held-out questions", done, len(sets))
        file = folder / f"{name}.safetensors"
        if not file.exists():
            interview.write(file, chosen, [temperature] * len(chosen), job.seed)
        out[name] = features.read(file)
    on_progress("Asking held-out questions", len(sets), len(sets))
    if passage:
        file = folder / "behind.safetensors"
        if not file.exists():
            everything = [q for kind in KINDS for q in asked[kind]]
            interview.write(file, everything, [0.0] * len(everything), job.seed, passage, _kept(job))
        for kind in KINDS:
            out[f"{kind}{_BEHIND}{len(passage)}"] = [s for s in features.read(file) if s.kind == kind]
    return out


def _kept(job: EagleJob) -> int:
    """Return how many tokens before a held-out question are kept: all that a head may see."""
    return FIRST + job.window


def _measured(
    head: DraftHead,
    ranked_W: Tensor,
    sets: Mapping[str, Sequence[FeatureSample]],
    hidden: int,
    stop_ids: Sequence[int],
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Return accepted lengths by set of prompts, and what the draft vocabulary costs by kind.

    Answers behind a long text lack ``hidden`` of its tokens.
    """
    size = TreeSize()
    quarter_V = ranked_W[: len(ranked_W) // 4]
    out: dict[str, Any] = {"tree": asdict(size), "vocab": len(quarter_V), "circular": {}}
    small = head.with_vocab(quarter_V)

    def adapted(sample: FeatureSample) -> Tensor:
        bits = vocab.bitmap(sample.ids_S[: sample.prompt], len(ranked_W))
        return vocab.adapt(ranked_W, bits, len(quarter_V), len(ranked_W), stop_ids)

    runs = [("static", name, small) for name in sets]
    runs += [(vocabulary, kind, head) for vocabulary in ("full", "adaptive") for kind in KINDS]
    for done, (vocabulary, name, drafting) in enumerate(runs):
        on_progress("Measuring the walk", done, len(runs))
        fair = [s for s in sets[name] if not s.circular and len(s.ids_S) > s.prompt + 1]
        out["circular"][name] = len(sets[name]) - len(fair)
        adapting = adapted if vocabulary == "adaptive" else None
        walked = walk(drafting, fair, size, adapting, hidden if _BEHIND in name else 0)
        out.setdefault(vocabulary, {})[name] = round(accepted_length(walked), 4)
    on_progress("Measuring the walk", len(runs), len(runs))
    out["mean"] = round(sum(out["static"][kind] for kind in KINDS) / len(KINDS), 4)
    return out
