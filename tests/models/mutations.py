"""Damaged model folders: JSON values changed, headers and tables that lie, files that are none, code as weights."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Mutation = tuple[str, Callable[[Path], None]]
JSON_FILES = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
)
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 3.7, -0.5, 1e308, float("nan"), float("inf"), 10**9, 10**18, -(10**18), 2**31),
    *("", "x", "10", "../../x", "full_attention", "flash_attention_2", "x" * 100_000, "\0", "\ud800"),
    *([], {}, [1], [None], ["x"] * 1000, [10**9] * 3, {"a": 1}, {"rope_type": "yarn"}, {"default": "x"}, DEEP),
)
STRAY: dict[str, Any] = {
    "auto_map": {"AutoConfig": "lamp.Lamp", "AutoModelForCausalLM": "lamp.Lamp", "AutoTokenizer": ["lamp.Lamp", None]},
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "compression_config": {"format": "pack"},
    "sliding_window": 8,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_logit_softcapping": 5.0,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 1e9}, "x": 3},
    "text_config": {"model_type": "llama"},
    "vision_config": {"hidden_size": 1},
    "num_experts": 10**7,
    "num_labels": 10**8,
    "id2label": {str(i): "x" for i in range(1000)},
    "per_layer_config": {"0": {"hidden_size": 3}},
    "pruned_heads": {"0": [0, 1]},
    "torch_dtype": "float8",
    "dtype": "os.system",
    "architectures": ["LampForCausalLM", 3],
    "is_encoder_decoder": True,
    "output_attentions": True,
    "tie_word_embeddings": True,
    "model_type": "mamba",
    "_commit_hash": 5,
    "name_or_path": "/dev/zero",
    "base_model_tp_plan": 3,
    "added_tokens_decoder": {"1": {"content": 5}},
    "extra_special_tokens": {"x": ["y"]},
    "chat_template": {"a": 3},
    "model_max_length": "many",
    "tokenizer_file": "/dev/zero",
    "vocab_file": "/dev/zero",
    "tokenizer_class": "LampTokenizer",
    "eos_token_id": [1.5, "x"],
    "eos_token": {"content": 7},
    "suppress_tokens": "x",
    "cache_implementation": "offloaded",
}


def mutations(folder: Path, seed: int) -> Iterator[Mutation]:
    """Yield all changes to a model folder, by name; each changes a copy of it that it is given."""
    for name in JSON_FILES:
        if (folder / name).exists():
            yield from _of_json(name, json.loads((folder / name).read_text()), seed)
    for file in sorted(folder.iterdir()):
        if file.is_file():
            yield from _of_any_file(file.name)
    for file in sorted(folder.glob("*.safetensors")):
        yield from _of_safetensors(file.name, seed)
    for file in sorted(folder.glob("*.bin")):
        yield from _of_pickles(file.name, seed)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where values stand, of long lists and tables the first only."""
    if at:
        yield at
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, each) in enumerate(inside):
        if number < 12 or len(at) < 1:
            yield from _places(each, (*at, key))


def _of_json(name: str, value: Any, seed: int) -> Iterator[Mutation]:
    places = list(_places(value))
    rng = random.Random(seed)

    def put(at: tuple[Any, ...], new: Any) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            made = copy.deepcopy(value)
            inner = made
            for key in at[:-1]:
                inner = inner[key]
            if new is put:  # drop it
                del inner[at[-1]]
            else:
                inner[at[-1]] = new
            (folder / name).write_text(json.dumps(made), encoding="utf-8")

        return change

    for at in places:
        yield f"{name} {at} dropped", put(at, put)
        few = VALUES if name in ("config.json", "model.safetensors.index.json") else rng.sample(VALUES, 8)
        for new in few:
            yield f"{name} {at} = {str(new)[:30]!r}", put(at, new)
    for key, new in STRAY.items():
        yield f"{name} stray {key}", put((key,), new)
    for text in ("", "{", "[]", "3", "null", "[" * 100_000, '{"a":' * 5000, "\ufeff{}", '{"a": 1' + "0" * 5000 + "}"):
        yield f"{name} is {text[:8]!r}", lambda folder, text=text: (folder / name).write_text(text)  # type: ignore[misc]


def _of_any_file(name: str) -> Iterator[Mutation]:
    def replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            (folder / name).unlink()
            make(folder / name)

        return change

    def cut(share: float) -> Callable[[Path], None]:
        return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))

    yield f"{name} gone", replaced(lambda file: None)
    yield f"{name} empty", replaced(lambda file: file.write_bytes(b""))
    yield f"{name} noise", replaced(lambda file: file.write_bytes(random.Random(0).randbytes(5000)))
    yield f"{name} a folder", replaced(lambda file: file.mkdir())
    yield f"{name} a pipe", replaced(os.mkfifo)
    yield f"{name} a broken link", replaced(lambda file: file.symlink_to("nowhere"))
    yield f"{name} a link to itself", replaced(lambda file: file.symlink_to(file.name))
    yield f"{name} a device", replaced(lambda file: file.symlink_to("/dev/zero"))
    yield f"{name} three gigabytes of nothing", replaced(lambda file: (file.touch(), os.truncate(file, 3 << 30)))
    for share in (0.01, 0.3, 0.99):
        yield f"{name} cut to {share}", cut(share)


def _of_safetensors(name: str, seed: int) -> Iterator[Mutation]:
    def with_header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            raw = (folder / name).read_bytes()
            length = struct.unpack("<Q", raw[:8])[0]
            header = json.loads(raw[8 : 8 + length])
            new = edit(header)
            text = new if isinstance(new, bytes) else json.dumps(header if new is None else new).encode()
            (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

        return change

    def flipped(number: int) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            rng, raw = random.Random(seed * 1000 + number), bytearray((folder / name).read_bytes())
            length = struct.unpack("<Q", raw[:8])[0]
            for _ in range(rng.choice((1, 3, 20))):
                raw[rng.randrange(8 + length)] = rng.randrange(256)
            (folder / name).write_bytes(raw)

        return change

    def first(header: dict[str, Any]) -> dict[str, Any]:
        entry: dict[str, Any] = next(value for key, value in header.items() if key != "__metadata__")
        return entry

    for key, values in {
        "shape": ([10**12, 10**6], [-1, 5], [], [1.5], "x", None, [2**63], {"a": 1}, [0]),
        "dtype": ("F64", "BF16", "F4", "X", 5, None, "BOOL", "U8"),
        "data_offsets": ([0, 10**15], [5, 3], [-8, 8], [0], "x", [0.5, 1], None, [0, 0, 0]),
    }.items():
        for value in values:
            yield f"{name} {key} = {value}", with_header(lambda h, k=key, v=value: first(h).update({k: v}))  # type: ignore[misc]
        yield f"{name} without {key}", with_header(lambda h, k=key: first(h).pop(k) and None)  # type: ignore[misc]
    for value in ({}, {"format": 3}, {"format": "tf"}, {"format": "x"}, "x", None, [1], DEEP):
        yield f"{name} metadata {str(value)[:20]}", with_header(lambda h, v=value: h.update(__metadata__=v))  # type: ignore[misc]
    yield f"{name} no metadata", with_header(lambda h: h.pop("__metadata__", None) and None)
    yield f"{name} renamed", with_header(lambda h: {f"x.{k}" if k != "__metadata__" else k: v for k, v in h.items()})
    yield f"{name} a tensor less", with_header(lambda h: dict(list(h.items())[:-1]))
    for text in (b"[" * 50_000, b"{}", b"[]", b"null", b"{" * 3, b'{"a":' * 5000, b"\xff" * 40, b'{"a": 5}'):
        yield f"{name} header {text[:5]!r}", with_header(lambda h, t=text: t)  # type: ignore[misc]
    for length in (0, 1, 7, 2**31, 2**63, 2**64 - 1, 100_000_001):

        def lying(folder: Path, length: int = length) -> None:
            raw = (folder / name).read_bytes()
            (folder / name).write_bytes(struct.pack("<Q", length) + raw[8:])

        yield f"{name} length {length}", lying
    for number in range(60):
        yield f"{name} flipped {number}", flipped(number)


class _Runs:
    """Unpickled without care, it runs a command."""

    def __reduce__(self) -> Any:
        return os.system, ("touch CODE_RAN",)


def _of_pickles(name: str, seed: int) -> Iterator[Mutation]:
    def saved(make: Callable[[dict[str, Any]], Any], **options: Any) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            state = torch.load(folder / name, weights_only=True)
            torch.save(make(state), folder / name, **options)

        return change

    def packed(folder: Path) -> None:
        with zipfile.ZipFile(folder / name) as old:
            parts = {each: old.read(each) for each in old.namelist()}
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as new:
            for each, data in parts.items():
                new.writestr(each, data)

    def flipped(folder: Path, number: int) -> None:
        rng, raw = random.Random(seed * 1000 + number), bytearray((folder / name).read_bytes())
        for _ in range(rng.choice((1, 5, 50))):
            raw[rng.randrange(min(len(raw), 8000))] = rng.randrange(256)
        (folder / name).write_bytes(raw)

    wide = torch.zeros(1).expand(1 << 20, 1 << 20)
    yield f"{name} runs code", lambda folder: (folder / name).write_bytes(pickle.dumps(_Runs()))  # type: ignore[arg-type]
    yield f"{name} runs code as torch saves", saved(lambda state: state | {"x": _Runs()})
    yield f"{name} legacy", saved(lambda state: state, _use_new_zipfile_serialization=False)
    yield f"{name} a list", saved(lambda state: list(state.values()))
    yield f"{name} one tensor", saved(lambda state: torch.zeros(3))
    yield f"{name} numbers", saved(lambda state: dict.fromkeys(state, 5))
    yield f"{name} nested", saved(lambda state: {"state_dict": state})
    yield f"{name} keys are numbers", saved(lambda state: dict(enumerate(state.values())))
    yield f"{name} a tensor less", saved(lambda state: dict(list(state.items())[:-1]))
    yield f"{name} far wider than its numbers", saved(lambda state: dict.fromkeys(state, wide))
    yield f"{name} sparse", saved(lambda state: dict.fromkeys(state, torch.zeros(5, 5).to_sparse()))
    yield f"{name} integers", saved(lambda state: {k: v.to(torch.int8) for k, v in state.items()})
    yield f"{name} meta", saved(lambda state: {k: v.to("meta") for k, v in state.items()})
    yield f"{name} packed", packed
    for number in range(25):
        yield f"{name} flipped {number}", lambda folder, n=number: flipped(folder, n)  # type: ignore[misc]
