"""Generation configuration of a model folder: stop tokens, rules that are followed, and settings that are not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apb.decode.rules import Rules
from apb.host.messages import HostSpec
from apb.models.files import damaged, read_json

_logger = logging.getLogger(__name__)

# Settings that change greedy decoding in transformers and are not followed here, with the values that change nothing.
# Settings of sampling, caches, speed and the length of answers are the caller's.
_IGNORED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "stop_strings": (),
}


def stop_ids(spec: HostSpec) -> tuple[int, ...]:
    """Return the model's stop tokens; random weights have none, as no token means anything to them."""
    from apb.models.loading import generation_stop_ids

    return () if spec.config is not None else generation_stop_ids(Path(spec.model_path))


def rules_asked(spec: HostSpec) -> tuple[Rules, tuple[str, ...]]:
    """Return what the model's folder asks for, as ``generation_rules``, after a warning of what is ignored; random
    weights ask for nothing."""
    if spec.config is not None:
        return Rules(), ()
    rules, ignored = generation_rules(Path(spec.model_path))
    if ignored:
        names = ", ".join(ignored)
        _logger.warning(
            "%s asks for %s, which is not followed: transformers may answer otherwise", spec.model_path, names
        )
    return rules, ignored


def generation_rules(path: Path) -> tuple[Rules, tuple[str, ...]]:
    """Return the rules that a model folder asks for, and the names of what it asks for beside them, which is ignored.

    Like transformers' they stand in generation_config.json or, in folders without that file, in config.json. A folder
    without either asks for nothing. Raises UserError for values that cannot be followed.
    """
    file = next((f for f in (path / "generation_config.json", path / "config.json") if f.exists()), None)
    if file is None:
        return Rules(), ()
    values = read_json(file)
    nested = values.get("text_config")
    if file.name == "config.json" and isinstance(nested, dict):
        values = nested | values
    found = {}
    for name, (convert, allowed) in _FOLLOWED.items():
        value = values.get(name)
        if value is None:
            continue
        try:
            found[name] = convert(value)
        except (TypeError, ValueError) as error:
            raise damaged(file, f"{name} is {str(value)[:80]}, and must be {allowed}") from error
    ignored = [n for n, same in _IGNORED.items() if values.get(n) is not None and values[n] not in (*same, [], {})]
    return Rules(**found), tuple(ignored)


def _penalty(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(value)
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _tokens(value: Any) -> tuple[int, ...]:
    return tuple(_count(i) for i in ([value] if isinstance(value, int) else value))


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    words = tuple(_tokens(list(word)) for word in value)
    if not all(words):
        raise ValueError(value)
    return words


_FOLLOWED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "repetition_penalty": (_penalty, "a number above 0"),
    "no_repeat_ngram_size": (_count, "a whole number"),
    "bad_words_ids": (_words, "lists of token ids"),
    "min_length": (_count, "a whole number"),
    "min_new_tokens": (_count, "a whole number"),
    "suppress_tokens": (_tokens, "a list of token ids"),
    "begin_suppress_tokens": (_tokens, "a list of token ids"),
}
