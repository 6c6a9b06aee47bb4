"""``apb train retaining_heads``: from a text to heads that ``apb ask`` uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from apb.compress import Candidates
from apb.compress.retaining import Retaining
from tests.support.tiny import saved_llama

pytest_plugins = ("tests.support.command",)
SMALL = ("prompts=2", "held_out=1", "shortest=200", "longest=250", "hidden=8", "epochs=1", "dtype=float32")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text long enough to draw documents from; its name has a space and '='."""
    file = tmp_path / "a text = long.txt"
    file.write_text(
        "\n\n".join(f"The king of hill {i} sees the sea. Then he sees the stars of {i}." for i in range(200))
    )
    return file


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with positions enough for any prompt."""
    return saved_llama(tmp_path_factory.mktemp("roomy"))


@pytest.mark.parametrize("method", ["mlp", "ridge"])
def test_train_and_use(apb: Any, ask: Any, roomy: str, text: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "out, here"
    words = ("train", "retaining_heads", "-d", str(text), f"model={roomy}", f"out={out}", f"method={method}", *SMALL)
    ran = apb(*words)
    assert ran.code == 0, ran.err
    found = ran.document
    assert Path(found["file"]) == out / "heads.safetensors" and found["method"] == method
    assert found["hidden"] == (8 if method == "mlp" else 0)
    assert {"plain", "embedded"} <= set(found["recall"]["ridge"]) and "random" in found["recall"]
    assert "Held-out recall" in ran.err and "Labelling prompts" in ran.err
    again = apb(*words)
    assert again.document["recall"] == found["recall"] and "Labelling" not in again.err
    asked = ask("strategy=apb", "cluster.hosts=3", "compress=retaining", f"compress.heads={found['file']}").document
    assert asked["plan"]["compressor"] == "retaining" and asked["token_ids"]
    apb(*words, "seed=1").refused("another job", "seed=1")


def test_the_runs_of_a_sweep_train_in_folders_of_their_own(apb: Any, roomy: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("train", "retaining_heads", "-m", "-d", str(text), f"model={roomy}", f"out={out}", *SMALL)
    ran = apb(*words, "method=ridge", "seed=0,1")
    assert ran.code == 0, ran.err
    files = [Path(run["file"]) for run in ran.document["runs"]]
    assert files == [out / "0" / "heads.safetensors", out / "1" / "heads.safetensors"]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert "Labelling" not in apb(*words, "method=ridge", "seed=0,1").err  # the same sweep finds what is there


def test_a_published_file_of_full_width_is_used(
    apb: Any, roomy: str, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gen = torch.Generator().manual_seed(0)
    state = {"model.norm.weight": torch.ones(64)}  # published checkpoints hold other keys, too
    for i in range(3):
        at = f"model.layers.{i}.self_attn"
        state[f"{at}.fc1.weight"] = torch.randn(1024, 128, generator=gen).bfloat16()
        state[f"{at}.fc2.weight"] = torch.randn(2, 1024, generator=gen).bfloat16()
    file = tmp_path / "heads, published.bin"
    torch.save(state, file)
    words = ("-d", str(document), "-q", "Who?", f"model={roomy}", "cluster=virtual", "cluster.hosts=3")
    words = ("ask", *words, "strategy=apb", "decode.max_new_tokens=12", "dtype=float32")
    asked = apb(*words, "compress=retaining", f"compress.heads={file}").document
    assert asked["plan"]["compressor"] == "retaining"
    scored: list[torch.Tensor] = []

    def score(self: Retaining, block: Candidates) -> torch.Tensor:
        """What the published code computes: raw q, k and v side by side, no bias, a max-pool of 5."""
        assert block.projections is not None
        x = torch.cat([block.projections.q_BSP, block.projections.k_BSP, block.projections.v_BSP], dim=-1)
        at = f"model.layers.{block.layer}.self_attn"
        fc1, fc2 = (state[f"{at}.{part}.weight"].float() for part in ("fc1", "fc2"))
        hidden = x @ fc1.T
        raw = (hidden * hidden.sigmoid() @ fc2.T).transpose(1, 2)
        scored.append(torch.nn.functional.max_pool1d(raw, 5, 1, 2))
        return scored[-1]

    monkeypatch.setattr(Retaining, "score", score)
    by_hand = apb(*words, "compress=retaining", f"compress.heads={file}").document
    assert by_hand["token_ids"] == asked["token_ids"] and scored
    assert apb(*words, "compress=random").document["token_ids"] != asked["token_ids"]


def test_what_training_refuses(apb: Any, ask: Any, model: Path, document: Path, text: Path, tmp_path: Path) -> None:
    words = ("train", "retaining_heads", f"model={model}", f"out={tmp_path / 'out'}", *SMALL)
    apb("train", "retaining_head", f"model={model}").refused("Did you mean retaining_heads")
    apb("train", "one", "two").refused("'two'")
    apb(*words, "-q", "Why?").refused("takes no -q")
    apb(*words, "method=magic").refused("method")
    apb(*words, "method=mlp", "prompts=0").refused("prompts=0")
    apb(*words, "shortest=300").refused("shortest=300")
    apb(*words, "threads=0").refused("threads=0")
    apb(*words, "-d", str(document)).refused("too short")
    apb(*words, "-d", str(text), "longest=4000", "shortest=4000", f"out={tmp_path / 'other'}").refused(
        "longest", "600 positions"
    )
    ask("compress=retaining").refused("belong to another model")
    ask("compress=retaining", f"compress.heads={tmp_path / 'nowhere'}").refused("no retaining heads")
