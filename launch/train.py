"""``apb train NAME``: one of the small heads, trained for any model on this machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from apb.engine import versions
from apb.heads import load
from apb.models.embedded import default_cache_dir
from apb.train.fit import Recipe
from apb.train.retaining import Job, Trained, digest, finished, train
from launch.arguments import Arguments
from launch.display import Display, size
from launch.document import corpus
from launch.settings import in_range, typed


@dataclass(frozen=True)
class _Settings:
    """conf/train.yaml with conf/train/retaining_heads.yaml."""

    model: str
    method: Literal["mlp", "ridge"]
    hidden: int
    prompts: int
    held_out: int
    shortest: int
    longest: int
    keep: int
    epochs: int
    lr: float
    seed: int
    dtype: str
    device: str
    threads: int
    out: str | None


def run(arguments: Arguments, config: Mapping[str, Any], display: Display) -> dict[str, Any]:
    """Train retaining heads, show their held-out recall, and return the JSON document; raises UserError."""
    from apb.models.honoured import check_config
    from apb.models.loading import load_config
    from apb.models.placement import resolve_device, resolve_dtype
    from apb.models.resolve import resolve

    settings = typed(_Settings, dict(config) | {"model": config["model"]["name"]}, "")
    in_range("threads", settings.threads, settings.threads >= 1, "1 or more")
    text = corpus(arguments)
    cache = Path(os.environ.get("APB_CACHE") or default_cache_dir())
    with display.progress() as on_progress:
        path = resolve(settings.model, on_progress=on_progress, cache_dir=cache)
    model_config = load_config(path)
    check_config(model_config)
    device = resolve_device(settings.device)
    recipe = Recipe(settings.method, settings.hidden, settings.epochs, lr=settings.lr, seed=settings.seed)
    job = Job(
        model=settings.model,
        text_sha256=digest(text),
        prompts=settings.prompts,
        held_out=settings.held_out,
        shortest=settings.shortest,
        longest=settings.longest,
        keep=settings.keep,
        seed=settings.seed,
        dtype=resolve_dtype(settings.dtype, device, model_config),
        recipe=recipe,
    )
    folder = Path(settings.out) if settings.out else cache / "train" / f"retaining_heads-{_short(job)}"
    trained = finished(folder, job)
    if trained is None:
        display.note(f"Working in {folder}: the same command goes on from there if it is interrupted.")
        trained = _train(job, path, device, settings.threads, text, folder, display)
    return _shown(trained, job, display)


def _train(job: Job, path: Path, device: str, threads: int, text: str, folder: Path, display: Display) -> Trained:
    from apb.host import HostSpec, load_adapter
    from apb.models.loading import load_tokenizer
    from burst.kernels import kernel

    if device == "cpu":
        torch.set_num_threads(threads)
    with display.waiting("Loading the model"):
        adapter = load_adapter(HostSpec(str(path), job.dtype, device))
    chosen = kernel("auto", device=adapter.device, dtype=adapter.dtype)
    with display.progress() as on_progress:
        return train(job, adapter, chosen, load_tokenizer(path), text, folder, on_progress)


def _shown(trained: Trained, job: Job, display: Display) -> dict[str, Any]:
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


def _short(job: Job) -> str:
    return hashlib.sha256(json.dumps(asdict(job), sort_keys=True).encode()).hexdigest()[:12]
