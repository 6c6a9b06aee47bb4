"""``apb train eagle``: the draft head of decode=eagle2, and the frequency list that it drafts from."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from apb.draft import Target, load
from apb.draft.eagle import EagleHead
from apb.draft.files import find, weights_file
from apb.engine.engine import versions
from apb.train.eagle import EagleJob, TrainedEagle, finished, train
from apb.train.folder import digest
from apb.train.tutor import TutorRecipe
from burst.errors import UserError, in_range
from launch.config.typed import typed
from launch.terminal.arguments import Arguments
from launch.terminal.display import Display, size
from launch.terminal.document import corpus
from launch.verbs.training.jobs.place import Place, place
from launch.verbs.training.settings import EagleSettings


def run(arguments: Arguments, config: dict[str, Any], display: Display) -> dict[str, Any]:
    """Train a head, show its accepted lengths on held-out prompts, and return the JSON document; raises UserError."""
    settings = typed(EagleSettings, config | {"model": config["model"]["name"]}, "")
    in_range("threads", settings.threads, settings.threads >= 1, "1 or more")
    text = corpus(arguments)
    where = place(settings.model, settings.device, settings.dtype, display)
    job = EagleJob(
        model=settings.model,
        text_sha256=digest(text),
        prompts=settings.prompts,
        held_out=settings.held_out,
        longest=settings.longest,
        behind=settings.behind,
        start_sha256=_hash(settings.start),
        window=settings.window,
        sinks=settings.sinks,
        seed=settings.seed,
        dtype=where.dtype,
        recipe=TutorRecipe(
            epochs=settings.epochs,
            batch=settings.batch,
            lr=settings.lr,
            unrolled=settings.unrolled,
            depth=settings.depth,
            seed=settings.seed,
        ),
    )
    folder = where.folder("eagle", job, settings.out)
    trained = finished(folder, job)
    if trained is None:
        display.note(f"Working in {folder}: the same command goes on from there if it is interrupted.")
        trained = _train(job, where, settings, text, folder, display)
    return _shown(trained, job, display)


def _hash(start: str | None) -> str | None:
    """What a job says of the head that it goes on from: its tensors' file; raises UserError when there is none."""
    if start is None:
        return None
    with weights_file(find(start)).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _begin(start: str, target: Target) -> EagleHead:
    """Return the head that training goes on from; raises UserError for one that is not like those made here."""
    head = load(start, target)
    probe = torch.ones(1, 1, 2, target.shape.heads.qk_dim, dtype=target.dtype, device=target.device)
    at = torch.tensor([1, 1000], device=target.device)
    turned = torch.allclose(head.target.rotate(probe, at), target.rotate(probe, at))
    if type(head) is not EagleHead or not turned:
        raise UserError(
            "training cannot go on from this head",
            given=f"start={start}: {type(head).__name__}, positions turned " + ("alike" if turned else "otherwise"),
            allowed="an EAGLE-1/2 head that turns positions as its model does",
            remedy="Choose another, or train one from nothing (start=null).",
        )
    return head


def _train(
    job: EagleJob, where: Place, settings: EagleSettings, text: str, folder: Path, display: Display
) -> TrainedEagle:
    from apb.models.loading import generation_stop_ids, load_tokenizer
    from apb.train.frequency import stop_tokens

    tokenizer = load_tokenizer(where.path)
    adapter = where.load(job.dtype, settings.threads, display)
    start = None if settings.start is None else _begin(settings.start, adapter.draft_target())
    stops = stop_tokens(tokenizer, generation_stop_ids(where.path))
    with display.progress() as on_progress:
        return train(job, adapter, tokenizer, stops, text, folder, on_progress, start)


def _shown(trained: TrainedEagle, job: EagleJob, display: Display) -> dict[str, Any]:
    found = trained.accepted
    columns = ["prompts", f"{found['vocab']:,} most frequent ids", "with the prompt's", "all ids", "left out"]
    rows = []
    for name, length in found["static"].items():
        others = [f"{found[kind][name]:.2f}" if name in found[kind] else "" for kind in ("adaptive", "full")]
        rows.append([name, f"{length:.2f}", *others, str(found["circular"][name])])
    display.table("Accepted length, the bonus token included", columns, rows)
    written = trained.file.stat().st_size + trained.ranked.stat().st_size
    display.note(f"Wrote {trained.file} and {trained.ranked}, {size(written)}.")
    return {
        "file": str(trained.file),
        "frequency": str(trained.ranked),
        "answers": str(trained.answers),
        "file_bytes": written,
        "model": job.model,
        "accepted_length": found["mean"],
        "accepted": found,
        "job": asdict(job),
        "versions": versions(),
    }
