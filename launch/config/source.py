"""Hydra over a verb's nodes: structured ones from the dataclasses, presets from conf/ and a user's own folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import initialize_config_module
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from burst.errors import UserError
from launch.config.groups import GROUPS
from launch.config.schema import Schema, defaults, nodes


@contextmanager
def hydra(schema: Schema, folder: Path | None = None) -> Iterator[Any]:
    """Yield Hydra's loader for a verb; ``folder``: a user's own presets, group by group.

    Raises UserError for a folder without presets, and for presets named as others are.
    """
    store = ConfigStore.instance()
    for name, group, package, values in nodes(schema):
        store.store(name=name, node=values, group=group, package=package)
    for group in schema.groups():
        if not GROUPS[group].presets:
            for name in GROUPS[group].names():
                label = {"name": name} if group != "burst" else {}
                store.store(name=name, node=label | defaults(GROUPS[group].options(name)), group=group)
    with initialize_config_module("conf", job_name="apb", version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
        if folder is not None:
            _check(folder, schema.root)
            loader.config_search_path.prepend("user", f"file://{folder.resolve()}", anchor="schema")
            loader.repository = ConfigRepository(loader.config_search_path)
        yield loader


def _check(folder: Path, root: str) -> None:
    """Raise UserError for a folder that holds no presets or hides other choices."""
    found = [(g, file.stem) for g in GROUPS for file in sorted((folder / g).glob("*.yaml"))]
    if not found:
        raise UserError(
            "the folder of presets holds none",
            given=f"--config-dir {folder}",
            allowed=f"a folder with YAML files in {', '.join(f'{g}/' for g in GROUPS)}",
            remedy="Put a preset into experiment/NAME.yaml below it, for example.",
        )
    hiding = [f"{group}/{name}.yaml" for group, name in found if name in GROUPS[group].names()]
    hiding += [name for name in (root, f"{root}.yaml") if (folder / name).exists()]
    if hiding:
        raise UserError(
            "a preset has the name of something that comes with this project",
            given=str(folder / hiding[0]),
            allowed="other names",
            remedy="Rename it.",
        )
