"""``apb train frequency``: which tokens a draft head drafts from, by how often they occur in a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apb.draft import vocab
from apb.engine.engine import versions
from apb.models.shape import model_shape
from apb.train.folder import digest
from apb.train.frequency import count_answers, count_text, stop_tokens
from burst.errors import UserError
from launch.config.typed import typed
from launch.terminal.arguments import Arguments
from launch.terminal.display import Display
from launch.terminal.document import corpus
from launch.verbs.training.jobs.place import place
from launch.verbs.training.settings import FrequencySettings


@dataclass(frozen=True)
class _Job:
    model: str
    corpus: str


def run(arguments: Arguments, config: dict[str, Any], display: Display) -> dict[str, Any]:
    """Count a corpus, write a list of each size, and return the JSON document; raises UserError."""
    from apb.models.loading import generation_stop_ids, load_config, load_tokenizer
    from apb.models.placement import torch_dtype

    settings = typed(FrequencySettings, config | {"model": config["model"]["name"]}, "")
    where = place(settings.model, settings.device, settings.dtype, display)
    size = model_shape(load_config(where.path), torch_dtype(where.dtype)).vocab
    _check_sizes(settings.vocab, size)
    tokenizer = load_tokenizer(where.path)
    stops = stop_tokens(tokenizer, generation_stop_ids(where.path))
    answers = arguments.document is not None and arguments.document.endswith(".safetensors")
    if answers:
        file = Path(str(arguments.document))
        counts_W, source = count_answers(file, size), str(file.resolve())
    else:
        text = corpus(arguments)
        with display.progress() as on_progress:
            counts_W = count_text(tokenizer, text, size, lambda done, of: on_progress("Counting the corpus", done, of))
        source = digest(text)
    folder = where.folder("frequency", _Job(settings.model, source), settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    ranked_W = vocab.rank(counts_W, stops)
    files, covered = [], {}
    for rows in settings.vocab:
        for suffix in ("pt", "safetensors"):
            files.append(folder / f"freq_{rows}.{suffix}")
            vocab.save(files[-1], ranked_W[:rows])
        covered[str(rows)] = round(vocab.coverage(counts_W, ranked_W[:rows]), 6)
    shown = [[f"{int(rows):,}", f"{int(rows) / size:.1%}", f"{share:.2%}"] for rows, share in covered.items()]
    display.table("Tokens of the corpus that a list has", ["ids", "of all ids", "tokens"], shown)
    display.note(f"Wrote {len(files)} lists to {folder}.")
    return {
        "files": [str(file) for file in files],
        "model": settings.model,
        "tokens": int(counts_W.sum()),
        "distinct": int((counts_W > 0).sum()),
        "stop_ids": list(stops),
        "coverage": covered,
        "versions": versions(),
    }


def _check_sizes(sizes: tuple[int, ...], vocabulary: int) -> None:
    wrong = [rows for rows in sizes if not 1 <= rows <= vocabulary]
    if wrong or not sizes:
        raise UserError(
            "a draft vocabulary's size is out of range",
            given=f"vocab={list(sizes)}",
            allowed=f"sizes of 1 to {vocabulary}",
            remedy="Change vocab, for example 'vocab=[8192,16384]'.",
        )
