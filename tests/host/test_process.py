"""What the operating system says is free: on control groups made for the test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from apb.host import process

FREE = 900


@pytest.mark.parametrize(
    "limit, used, free",
    [
        ("500", 300, 260),  # 60 of the 300 are copies of files that can go
        ("500", 580, 0),
        ("5000", 300, FREE),
        ("max", 300, FREE),
        (None, 300, FREE),
    ],
)
def test_a_containers_cached_files_count_as_free(
    limit: str | None, used: int, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_CGROUP", tmp_path)
    monkeypatch.setattr(process.psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_anon 7\nactive_file 30\ninactive_file 60\n")
    assert process.available_bytes(torch.device("cpu")) == free
