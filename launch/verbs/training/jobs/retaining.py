"""``apb train retaining_heads``: the heads of compress=retaining."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from apb.compress.heads import load
from apb.engine.engine import versions
from apb.train.fit import FitRecipe
from apb.train.folder import digest
from apb.train.retaining import RetainingJob, TrainedHeads, finished, train
from burst.errors import in_range
from launch.config.typed import typed
from launch.terminal.arguments import Arguments
from launch.terminal.display import Display, size
from launch.terminal.document import corpus
from launch.verbs.training.jobs.place import Place, place
from launch.verbs.training.settings import RetainingSettings


def run(arguments: Arguments, config: dict[str, Any], display: Display) -> dict[str, Any]:
    """Train retaining heads, show their held-out recall, and return the JSON document; raises UserError."""
    settings = typed(RetainingSettings, config | {"model": config["model"]["name"]}, "")
    in_range("threads", settings.threads, settings.threads >= 1, "1 or more")
    text = corpus(arguments)
    where = place(settings.model, settings.device, settings.dtype, display)
    recipe = FitRecipe(settings.method, settings.hidden, settings.epochs, lr=settings.lr, seed=settings.seed)
    job = RetainingJob(
        model=settings.model,
        text_sha256=digest(text),
        prompts=settings.prompts,
        held_out=settings.held_out,
        shortest=settings.shortest,
        longest=settings.longest,
        keep=settings.keep,
        seed=settings.seed,
        dtype=where.dtype,
        recipe=recipe,
    )
    folder = where.folder("retaining_heads", job, settings.out)
    trained = finished(folder, job)
    if trained is None:
        display.note(f"Working in {folder}: the same command goes on from there if it is interrupted.")
        trained = _train(job, where, settings.threads, text, folder, display)
    return _shown(trained, job, display)


def _train(job: RetainingJob, where: Place, threads: int, text: str, folder: Path, display: Display) -> TrainedHeads:
    from apb.models.loading import load_tokenizer
    from burst.kernels import kernel

    adapter = where.load(job.dtype, threads, display)
    chosen = kernel("auto", device=adapter.device, dtype=adapter.dtype)
    with display.progress() as on_progress:
        return train(job, adapter, chosen, load_tokenizer(where.path), text, folder, on_progress)


def _shown(trained: TrainedHeads, job: RetainingJob, display: Display) -> dict[str, Any]:
    rows = [[scorer, f"{row['plain']:.3f}", f"{row['embedded']:.3f}"] for scorer, row in trained.recall.items()]
    display.table("Held-out recall of the true top 10%", ["scorer", "plain anchor", "question embedded"], rows)
    written = trained.file.stat().st_size
    display.note(f"Wrote {trained.file}, {size(written)}. Use it: compress=retaining compress.heads={trained.file}")
    return {
        "file": str(trained.file),
        "file_bytes": written,
        "model": job.model,
        "method": job.recipe.method,
        "hidden": load(trained.file).layers[0].hidden,
        "recall": trained.recall,
        "job": asdict(job),
        "versions": versions(),
    }
