"""Text towers of composite checkpoints: the text model's own configuration, and the names of its tensors in the files.

A composite reads images or sound beside text; without them it is its text model. The tower's tensors have other
prefixes in every generation of files, and files of both generations are published, so the prefixes are read off the
files. Tensors outside the tower are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from apb.files.tables import Shapes
from burst.errors import UserError

# Composites that compute for text alone what their text model computes; the tests compare each with its text model.
# Others (PaliGemma, say) let a prompt's tokens see those behind them, or number positions otherwise.
TOWERS = frozenset(
    {
        "exaone4_5",
        "gemma3",
        "gemma4",
        "idefics3",
        "internvl",
        "llama4",
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "qwen3_5",
        "qwen3_5_moe",
        "smolvlm",
    }
)
_WRAPPERS = re.compile(r"^(?:(?:model|language_model|text_model)\.)*")
_HEAD, _DECODER = "lm_head", "model"  # of every text class that a tower has


@dataclass(frozen=True)
class Tower:
    """The tensors of a text model in a composite's files.

    ``names``: each tensor's name in the files and in the text class; ``key_mapping``: the same as transformers takes
    it; ``outside``: how many other tensors there are.
    """

    names: dict[str, str]
    key_mapping: dict[str, str]
    outside: int

    def shapes(self, found: Shapes) -> Shapes:
        """Return the shapes of the tower's tensors by their names in the text class."""
        return {text: found[name] for name, text in self.names.items()}


def is_tower(config: Any) -> bool:
    """Return True for the configuration of a composite whose text tower can be loaded."""
    return getattr(config, "model_type", None) in TOWERS and config.get_text_config() is not config


def text_config(config: Any, values: Mapping[str, Any], names: Iterable[str] | None) -> Any:
    """Return the text model's configuration with what the composite's alone says of it.

    ``values``: the composite's configuration as it is in the file; ``names``: the tensors in its files, None where
    there are no files.
    """
    text = config.get_text_config()
    for name in ("dtype", "quantization_config", "compression_config"):
        if getattr(text, name, None) is None and getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    # The composite has the head, so it says whether that is the embedding; a text model's own default says nothing.
    nested = values.get("text_config")
    said = nested.get("tie_word_embeddings") if isinstance(nested, Mapping) else None
    tied = getattr(config, "tie_word_embeddings", None)
    text.tie_word_embeddings = bool(text.tie_word_embeddings if tied is None else tied or said)
    if names is not None and any(_inside(name, {_HEAD}) for name in names):
        text.tie_word_embeddings = False
    return text


def find_tower(found: Shapes, wanted: Iterable[str], where: str) -> Tower:
    """Return the tensors of the text model with the parameters ``wanted`` among those of a composite's files.

    ``where``: the file to name. Raises UserError where there are none, and where two tensors are the same one.
    """
    children = {name.split(".")[1] for name in wanted if name.startswith(f"{_DECODER}.")}
    inner = {name: inside for name in found if (inside := _inside(name, children | {_HEAD})) is not None}
    names = {name: x if x.startswith(f"{_HEAD}.") else f"{_DECODER}.{x}" for name, x in inner.items()}
    prefixes = {name.removesuffix(x) for name, x in inner.items()}
    if not names:
        raise UserError(
            f"the checkpoint {where} holds no text tower",
            given=f"{len(found)} tensors, such as {min(found, default='none')}",
            allowed="a composite checkpoint with its text model",
            remedy="Copy or download all of the model's files, or choose another model.",
        )
    _check_alike(inner, where)
    behind = "|".join(re.escape(child) for child in sorted(children))
    mapping = {rf"^{re.escape(prefix)}(?=(?:{behind})\.)": f"{_DECODER}." for prefix in sorted(prefixes)}
    mapping |= {rf"^{re.escape(prefix)}(?={_HEAD}\.)": "" for prefix in sorted(prefixes) if prefix}
    return Tower(names, mapping, len(found) - len(names))


def _check_alike(inner: Mapping[str, str], where: str) -> None:
    """Reject a layer whose tensors have several prefixes: some may be there twice, and experts would change places.

    transformers stacks a layer's experts in the order of their names in the files.
    """
    firsts: dict[str, str] = {}
    for name, inside in sorted(inner.items(), key=lambda pair: pair[1]):
        layer = ".".join(inside.split(".")[:2])  # or, outside layers, the tensor
        first = firsts.setdefault(layer, name)
        if name.removesuffix(inside) != first.removesuffix(inner[first]):
            raise UserError(
                f"the checkpoint {where} has two kinds of names for {layer} of its text tower",
                given=f"{first} and {name}",
                allowed="one prefix for all tensors of a layer",
                remedy="Copy or download the model's files again, without those of another release between them.",
            )


def _inside(name: str, children: set[str]) -> str | None:
    """Return a tensor's name without what stands before the tower's child that has it; None for one outside."""
    inside = _WRAPPERS.sub("", name)
    return inside if inside.partition(".")[0] in children and "." in inside else None
