"""Training of retaining heads: label prompts, fit every layer, measure, write one file; every stage can be resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apb.compress.heads import Head, RetainingHeads, load, save
from apb.models.adapter import Adapter
from apb.train import shards
from apb.train.fit import FitRecipe, Method, fit
from apb.train.folder import OnProgress, claim
from apb.train.prompts import Prompts
from apb.train.recall import measure
from burst.errors import in_range
from burst.kernels import Kernel

_SAMPLES, _LAYERS, _HEADS = "samples", "layers", "heads.safetensors"


@dataclass(frozen=True)
class RetainingJob:
    """Inputs of a training run. Counts are of prompts; lengths in tokens; the text's hash stands for the text."""

    model: str
    text_sha256: str
    prompts: int = 800
    held_out: int = 30
    shortest: int = 400
    longest: int = 1600
    keep: int = 160  # tokens of a prompt that are kept for fitting: more prompts teach more than more tokens of each
    seed: int = 0
    dtype: str = "bfloat16"  # of the frozen model
    recipe: FitRecipe = field(default_factory=FitRecipe)

    def __post_init__(self) -> None:
        for key in ("prompts", "held_out", "keep"):
            in_range(key, getattr(self, key), getattr(self, key) >= 1, "1 or more")
        in_range("shortest", self.shortest, 20 <= self.shortest <= self.longest, f"20 to longest={self.longest}")
        in_range("seed", self.seed, self.seed >= 0, "0 or more")


@dataclass(frozen=True)
class TrainedHeads:
    """The file, and held-out recall by scorer: ``mlp`` and ``ridge`` as trained, ``random``."""

    file: Path
    recall: dict[str, dict[str, float]]


def train(
    job: RetainingJob,
    adapter: Adapter,
    kernel: Kernel,
    tokenizer: Any,
    text: str,
    folder: Path,
    on_progress: OnProgress,
) -> TrainedHeads:
    """Train heads for the model behind ``adapter`` in ``folder`` and return the final file there.

    What is found in the folder is not done again: labelled prompts, fitted layers. A layer's fit depends on nothing
    but the job, so a run that was killed ends with the weights of one that was not. Raises UserError when the folder
    is another job's, or when prompts do not fit the model.
    """
    prompts = Prompts(tokenizer, text, (job.shortest, job.longest), adapter.shape.max_positions, job.seed)
    claim(folder, asdict(job))
    files = _label(job, adapter, kernel, prompts, folder / _SAMPLES, on_progress)
    # Ridge is fitted beside the MLP: a network that is no better than a closed form is not worth its cost.
    methods: tuple[Method, ...] = ("ridge", "mlp") if job.recipe.method == "mlp" else ("ridge",)
    found: dict[str, list[Head]] = {
        method: _fit(job, method, adapter, files, folder / _LAYERS, on_progress) for method in methods
    }
    recall = measure(
        adapter,
        kernel,
        prompts,
        job.held_out,
        found,
        lambda done, total: on_progress("Measuring held-out prompts", done, total),
    ).table()
    about = {
        "model": job.model,
        "method": job.recipe.method,
        "job": json.dumps(asdict(job)),
        "held_out_recall": json.dumps(recall),
    }
    heads = RetainingHeads(tuple(found[job.recipe.method]), window=1, keys="from_end", about=about)
    save(folder / _HEADS, heads)
    shutil.rmtree(folder / _SAMPLES)
    shutil.rmtree(folder / _LAYERS)
    return TrainedHeads(folder / _HEADS, recall)


def finished(folder: Path, job: RetainingJob) -> TrainedHeads | None:
    """Return what an earlier run of the same job left in the folder, if it ended."""
    if not (folder / _HEADS).is_file():
        return None
    claim(folder, asdict(job))
    return TrainedHeads(folder / _HEADS, json.loads(load(folder / _HEADS).about["held_out_recall"]))


def _label(
    job: RetainingJob, adapter: Adapter, kernel: Kernel, prompts: Prompts, folder: Path, on_progress: OnProgress
) -> list[Path]:
    """Write what is missing of the labelled prompts and return all their files, in order."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"{number:05d}.safetensors" for number in range(job.prompts)]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    for done, number in enumerate(missing):
        on_progress("Labelling prompts", done, len(missing))
        sample = prompts.sample(number)
        _check_room(sample.prompt.token_ids, adapter.shape.max_positions)
        embedded = number % 2 == 1
        shards.write(files[number], adapter, kernel, sample, embedded=embedded, keep=job.keep, seed=number)
    return files


def _fit(
    job: RetainingJob, method: Method, adapter: Adapter, files: list[Path], folder: Path, on_progress: OnProgress
) -> list[Head]:
    """Fit what is missing of the layers and return every layer's head, fp32, on the model's device."""
    folder.mkdir(exist_ok=True)
    recipe = dataclasses.replace(job.recipe, method=method)
    layers = adapter.shape.layers
    heads = []
    for layer in range(layers):
        file = folder / f"{method}-{layer:03d}.safetensors"
        if not file.exists():
            x_NE, margin_NK = shards.read(files, layer)

            def on_step(done: int, total: int, before: int = layer) -> None:
                on_progress(f"Fitting layers, {method}", before * total + done, layers * total)

            head = fit(recipe, layer, x_NE.to(adapter.device), margin_NK.to(adapter.device), on_step)
            shards.write_head(file, head)
        heads.append(shards.read_head(file).to(adapter.device))
    return heads


def _check_room(token_ids: tuple[int, ...], positions: int) -> None:
    given = f"{len(token_ids)} tokens in one prompt"
    in_range("longest", given, len(token_ids) < positions, f"below {positions} positions")
