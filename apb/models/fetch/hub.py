"""A model from the Hugging Face hub, or from its local cache when the hub cannot be reached."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

from apb.models.files import Progress
from burst.errors import UserError

_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
# Copies of the weights for other programs would double the download.
_UNWANTED = ["*/*.safetensors", "*/*.bin", "consolidated*", "original/*", "onnx/*"]
_TIMEOUT_S = 20.0
_INTERVAL_S = 0.2


def download(name: str, on_progress: Progress) -> Path:
    """Return the local folder of the hub model ``name`` ("org/model"), fetching what is missing.

    Fetches configuration, tokenizer and safetensors; ``.bin`` weights where there are no others. Raises
    UserError when the model does not exist, is gated, or the hub is out of reach and nothing is cached.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    wanted, failures = list(_WANTED), _failures()
    try:
        try:
            files = [f.rfilename for f in huggingface_hub.HfApi().model_info(name, timeout=_TIMEOUT_S).siblings or []]
        except (GatedRepoError, RepositoryNotFoundError):
            raise
        except failures as error:
            return _cached(name, error)
        if not any("/" not in file and file.endswith(".safetensors") for file in files):
            wanted.append("*.bin")
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=wanted, ignore_patterns=_UNWANTED, tqdm_class=_bar(name, on_progress)
        )
        return Path(folder)
    except GatedRepoError as error:
        raise _error(
            name,
            "is gated",
            f"Accept its licence at https://huggingface.co/{name} and log in with 'hf auth login'.",
        ) from error
    except RepositoryNotFoundError as error:
        raise _error(
            name,
            "does not exist on the Hugging Face hub, or is private",
            "Check the spelling of 'organisation/model', or log in with 'hf auth login'.",
        ) from error
    except UserError:  # itself a ValueError
        raise
    except failures as error:
        raise _unreachable(name, error) from error


def _failures() -> tuple[type[Exception], ...]:
    """Return what the hub's client raises when something cannot be had.

    Beside its own errors it passes on its HTTP library's, which changes between versions (``HTTPError`` is whichever it
    has), those of a proxy's page that is no JSON (ValueError), and its fast downloader's (RuntimeError).
    """
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    return OSError, HTTPError, EntryNotFoundError, ValueError, RuntimeError


def _cached(name: str, error: Exception) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except _failures():
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> UserError:
    return _error(
        name,
        f"could not be fetched from the Hugging Face hub ({type(error).__name__}: {error})",
        "Copy the model's folder (config.json, *.safetensors, tokenizer files) to this machine and give its "
        "path, or use the embedded model 'smollm2-135m'.",
    )


def _error(name: str, what: str, remedy: str) -> UserError:
    return UserError(
        f"the model '{name}' {what}",
        given=name,
        allowed="an embedded model, a local folder with config.json, or a hub id that can be reached",
        remedy=remedy,
    )


def _bar(name: str, on_progress: Progress) -> type[Any]:
    """Return a tqdm class that draws nothing and reports bytes to ``on_progress``, one call at a time."""
    from tqdm import tqdm

    lock = threading.Lock()
    phase = f"Fetching {name}"

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.update(file=io.StringIO(), disable=False, mininterval=_INTERVAL_S)
            super().__init__(*args, **options)

        def display(self, *args: Any, **options: Any) -> None:
            if self.unit == "B":
                with lock:
                    on_progress(phase, int(self.n), int(self.total or 0))

    return Bar
