"""The frozen model's answers on disk, with the features that draft heads learn to predict: one file a batch.

Shapes: N tokens of all samples of a file side by side, M samples, E feature width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from apb.train.answers import Answer


@dataclass(frozen=True)
class FeatureSample:
    """A prompt and its answer as one sequence, each token with its feature; ``question`` is the prompt's own text.

    The answer's last token is left out: the model never ran it.
    """

    kind: str
    question: str
    prompt: int  # tokens
    ids_S: Tensor
    features_SE: Tensor
    circular: bool


def write(file: Path, answers: Sequence[Answer], kinds: Sequence[str], questions: Sequence[str]) -> None:
    """Write answers that were made with features, in the features' type; the file appears whole or not at all."""
    tensors = {
        "ids": torch.cat([torch.tensor(a.ids[:-1], dtype=torch.int32) for a in answers]),
        "features": torch.cat([a.features_SE.cpu() for a in answers if a.features_SE is not None]),
        "lengths": torch.tensor([len(a.ids) - 1 for a in answers]),
        "prompts": torch.tensor([a.prompt for a in answers]),
        "circular": torch.tensor([a.circular for a in answers]),
    }
    assert len(tensors["ids"]) == len(tensors["features"])
    unfinished = file.with_suffix(".part")
    save_file(
        tensors, unfinished, metadata={"kinds": json.dumps(list(kinds)), "questions": json.dumps(list(questions))}
    )
    os.replace(unfinished, file)


def read(file: Path) -> list[FeatureSample]:
    """Return a file's samples; features stay mapped to the file until they are touched."""
    with safe_open(file, framework="pt") as opened:
        ids, features, lengths, prompts, circular = (
            opened.get_tensor(name) for name in ("ids", "features", "lengths", "prompts", "circular")
        )
        about = opened.metadata()
    kinds, questions = json.loads(about["kinds"]), json.loads(about["questions"])
    sizes = lengths.tolist()
    parts = zip(
        kinds, questions, prompts.tolist(), ids.split(sizes), features.split(sizes), circular.tolist(), strict=True
    )
    return [FeatureSample(*part) for part in parts]


def read_ids(file: Path) -> list[Tensor]:
    """Return the answers' token ids alone, int32, one tensor an answer."""
    with safe_open(file, framework="pt") as opened:
        ids, lengths, prompts = (opened.get_tensor(name) for name in ("ids", "lengths", "prompts"))
    return [ids_S[p:] for ids_S, p in zip(ids.split(lengths.tolist()), prompts.tolist(), strict=True)]
