"""The verb ``train``."""

from __future__ import annotations

from typing import Any, ClassVar

from burst.registry import Registry
from launch.verbs.base import VERBS, NamedVerb, Verb


@VERBS.register("train", "train one of the small heads")
class Train(NamedVerb):
    """``apb train NAME``."""

    document: ClassVar[bool] = True
    default: ClassVar[str | None] = "retaining_heads"
    examples: ClassVar[tuple[tuple[str, str], ...]] = (
        ("apb train retaining_heads model=org/name", "heads for a model, from generated prompts"),
        ("apb train retaining_heads -d book.txt method=ridge", "in a minute or two, with a text of yours"),
        ("apb train eagle model=org/name prompts=20000", "a draft head, from the model's own answers"),
        ("apb train frequency -d corpus.txt 'vocab=[8192,16384]'", "what a draft head drafts from"),
    )

    @property
    def names(self) -> Registry[type[Verb]]:
        """What can be trained."""
        from launch.verbs.training.base import TRAININGS

        return TRAININGS

    def settings(self) -> type[Any]:
        """Return the settings of all trainings."""
        from launch.verbs.training.settings import TrainSettings

        return TrainSettings
