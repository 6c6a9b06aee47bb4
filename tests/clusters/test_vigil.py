"""Signs of life: what makes work slow, what makes it stand still, and what a watcher makes of silence."""

from __future__ import annotations

import time

import pytest

from launch.hosts.progress import Progress
from launch.hosts.vigil import ATTENTION_S, MARGIN_S, Vigil


def test_work_that_sleeps_stands_still_and_work_that_computes_or_steps_is_slow() -> None:
    progress = Progress()
    assert progress.idle_s() == 0.0
    with progress.working():
        progress.idle_s()
        time.sleep(0.2)
        assert progress.idle_s() >= 0.2
        progress.step("post", "layer 3", 1)
        assert progress.idle_s() == 0.0
        time.sleep(0.2)
        assert progress.idle_s() >= 0.2
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass
        assert progress.idle_s() == 0.0
    time.sleep(0.2)
    assert progress.idle_s() == 0.0  # nothing is asked of it


def test_silence_and_standstill(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("launch.hosts.vigil.time.monotonic", lambda: now[0])
    vigil = Vigil((0, 1, 2), timeout_s=10.0)
    for _ in range(10):
        now[0] += 1.0
        vigil.heard(0)
        vigil.heard(1, now[0] - 100.0)
        assert not vigil.lost((0, 1, 2))
    now[0] += 1.0
    vigil.heard(0)
    vigil.heard(1, 10 + MARGIN_S + 1)
    lost = vigil.lost((0, 1, 2))
    assert set(lost) == {1, 2}
    assert "stood still for 15 s" in lost[1] and "not answered for 11 s" in lost[2]
    assert not vigil.lost((0,))


def test_a_watcher_that_was_stopped_itself_starts_counting_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("launch.hosts.vigil.time.monotonic", lambda: now[0])
    vigil = Vigil((0,), timeout_s=10.0)
    now[0] += 500.0
    assert not vigil.lost((0,))
    for _ in range(9):
        now[0] += ATTENTION_S / 3
        assert not vigil.lost((0,))
    now[0] += 2.0
    assert vigil.lost((0,))
