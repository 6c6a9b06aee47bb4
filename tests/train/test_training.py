"""Training of retaining heads: prompts, labels, fits, and a run that is killed again and again."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apb.compress import compressor
from apb.compress.heads import load
from apb.layers.call import Call, plain
from apb.models.adapter import Adapter
from apb.plan.split import blocks
from apb.strategies import strategy
from apb.train.fit import FitRecipe, fit
from apb.train.folder import digest
from apb.train.labels import PromptLayout, observe
from apb.train.prompts import FAMILIES, LabelPrompt, Prompts
from apb.train.recall import Recall
from apb.train.retaining import RetainingJob, finished, train
from apb.train.shards import margin, top_count
from burst.errors import UserError
from burst.kernels import kernel
from tests.support import tiny
from tests.support.tiny import byte_tokenizer, make_prompt, tiny_engine, tiny_llama

TEXT = "\n\n".join(
    f"Paragraph {i} says that the king saw the sea. Then star {i} rose over hill {i}." for i in range(900)
)


def sample(context: int = 60, before: int = 0, behind: int = 0) -> LabelPrompt:
    return LabelPrompt(make_prompt(context), tiny.random_ids(4, 9), "any", before, behind)


# -- prompts --------------------------------------------------------------------------------------------


@functools.cache
def prompts(seed: int = 0) -> Prompts:
    return Prompts(byte_tokenizer(), TEXT, (600, 900), 4096, seed)


def test_prompts_are_the_same_every_time_and_held_out_ones_are_others() -> None:
    again = Prompts(byte_tokenizer(), TEXT, (600, 900), 4096, 0)
    numbers = range(12)
    assert [prompts().sample(n) for n in numbers] == [again.sample(n) for n in numbers]
    train_ids = {prompts().sample(n).prompt.context_ids for n in numbers}
    held_ids = {prompts().sample(n, held_out=True).prompt.context_ids for n in numbers}
    assert len(train_ids) == len(held_ids) == 12 and not train_ids & held_ids
    assert prompts(1).sample(0) != prompts(0).sample(0)


def test_every_family_asks_what_its_document_answers() -> None:
    seen = set()
    for number in range(15):
        made = prompts().sample(number)
        seen.add(made.family)
        document = byte_tokenizer().decode(made.prompt.context_ids)
        answer = byte_tokenizer().decode(made.answer_ids)
        wanted = [answer] if made.family == "reading" else answer.rstrip(".").split(", ")
        assert all(part in " ".join(document.split()) for part in wanted), (made.family, answer)
        assert 400 < len(made.prompt.context_ids) < 1500
    assert seen == set(FAMILIES)


def test_gaps_stay_within_the_reach_and_held_out_prompts_have_none() -> None:
    gaps = [prompts().sample(n) for n in range(30)]
    assert 5 < sum(s.before + s.behind > 0 for s in gaps) < 25
    for s in gaps:
        assert len(s.prompt.token_ids) + len(s.answer_ids) + s.before + s.behind <= 4096
    assert not any(s.before or s.behind for s in (prompts().sample(n, held_out=True) for n in range(10)))


def test_a_short_text_is_refused() -> None:
    with pytest.raises(UserError, match="too short"):
        Prompts(byte_tokenizer(), "short", (600, 900), 4096, 0)


# -- labels ---------------------------------------------------------------------------------------------


class Written:
    """The layout's attention as one mask, and importance by the rules in words."""

    needs_projections = False

    def __init__(self, adapter: Adapter, made: LabelPrompt, embedded: bool) -> None:
        prompt = made.prompt
        assert prompt.question is not None
        copy = prompt.question.ids if embedded else ()
        s, n, rows = prompt.head, len(prompt.context_ids), (*prompt.question.query_ids, *made.answer_ids)
        kinds = "h" * s + "c" * len(copy) + "d" * (n - s) + "q" * len(rows)
        self.ids = (*prompt.context_ids[:s], *copy, *prompt.context_ids[s:], *rows)
        first, after = s + made.before, n + made.before + made.behind
        self.positions = [*range(s), *range(s, s + len(copy)), *range(first, first + n - s)]
        self.positions += range(after, after + len(rows))
        self.mask = torch.tensor(
            [[j <= i and (a, b) != ("q", "c") for j, b in enumerate(kinds)] for i, a in enumerate(kinds)]
        )
        self.document = torch.tensor([kind == "d" for kind in kinds])
        self.rows = torch.tensor([kind == "q" for kind in kinds])
        self.importance: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.turn, self.end = tiny.rotation(adapter), after

    def __call__(self, call: Call) -> Tensor:
        layer, (q, k, v, scale) = call.layer, plain(call)
        group = q.shape[1] // k.shape[1]
        logits = torch.einsum("bhsd,bhtd->bhst", q, k.repeat_interleave(group, 1)) * scale
        best = logits[0][:, self.rows][:, :, self.document].amax(1)
        self.importance.append(best.view(k.shape[1], group, -1).amax(1))
        self.keys.append(self.turn(k[0][:, self.document], -self.end, layer))
        weights = logits.masked_fill(~self.mask, -torch.inf).softmax(-1)
        return torch.einsum("bhst,bhtd->bshd", weights, v.repeat_interleave(group, 1))


@pytest.mark.parametrize("gap", [(0, 0), (40, 300)])
@pytest.mark.parametrize("embedded", [False, True])
def test_labels_are_the_largest_logits_of_question_and_answer(embedded: bool, gap: tuple[int, int]) -> None:
    adapter = tiny_llama(torch.float64)
    made = sample(60, *gap)
    want = Written(adapter, made, embedded)
    with torch.inference_mode():
        adapter.run(torch.tensor(want.ids), torch.tensor(want.positions), want)
    layout = PromptLayout.of(made, embedded=embedded)
    assert layout.ids == want.ids and list(layout.positions) == want.positions
    found: list[tuple[Tensor, Tensor]] = []
    observe(adapter, kernel("reference"), made, embedded=embedded, on_layer=lambda i, x, y: found.append((x, y)))
    assert len(found) == adapter.shape.layers
    for (x_TE, importance_KT), wanted, keys in zip(found, want.importance, want.keys, strict=True):
        torch.testing.assert_close(importance_KT, wanted, atol=1e-5, rtol=0, check_dtype=False)
        torch.testing.assert_close(x_TE[:, 64:96], torch.cat(list(keys), dim=-1), atol=1e-9, rtol=0)


def test_a_head_reads_in_a_prefill_what_it_read_in_training() -> None:
    adapter, made, read = tiny_llama(torch.float64), sample(), list[Tensor]()
    observe(adapter, kernel("reference"), made, embedded=False, on_layer=lambda i, x, y: read.append(x))

    class Spy(type(compressor("norm"))):  # type: ignore[misc]
        needs_projections = True

        def score(self, block: Any) -> Tensor:
            from apb.compress.heads import head_input

            seen.append((block.layer, block.start, head_input(block.projections, block.keys_from_end())))
            return super().score(block)

    seen: list[tuple[int, int, Tensor]] = []
    tiny_engine(adapter, strategy("apb"), 2, Spy()).prefill(made.prompt)
    (start, stop), head = blocks(60, 2)[0], made.prompt.head
    first = [x for layer, at, x in seen if (layer, at) == (0, start)]
    assert len(first) == 1
    torch.testing.assert_close(first[0][0, head:], read[0][: stop - head], atol=1e-9, rtol=0)


def test_margins_are_above_zero_for_the_top_tenth() -> None:
    importance = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    above = margin(importance) > 0
    assert above.sum(-1).tolist() == [20, 20, 20] and top_count(200) == 20
    for row, chosen in zip(importance, above, strict=True):
        assert row[chosen].min() > row[~chosen].max()


def test_recall_is_the_share_of_the_true_top_tenth() -> None:
    recall, importance = Recall(), torch.arange(40.0).flip(0)[None]
    scores = importance.clone()
    scores[0, 0] = -1.0  # of the four best one is missed
    recall.add("mine", "plain", "needles", scores, importance)
    recall.add("mine", "plain", "reading", importance, importance)
    assert recall.table() == {"mine": {"plain": 0.875, "plain/needles": 0.75, "plain/reading": 1.0}}


# -- fits -----------------------------------------------------------------------------------------------


def test_the_network_finds_what_a_linear_map_cannot() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 12, generator=gen) * 3 + 1
    importance = x[:, 0] / 3 + ((x[:, 1] - 1) / 3).abs() * 2
    y = margin(torch.stack([importance, -importance])).T
    found = {}
    for method in ("ridge", "mlp"):
        head = fit(FitRecipe(method=method, hidden=32, lr=1e-2, weight_decay=0.0), 0, x, y, lambda done, total: None)
        recall = Recall()
        recall.add(method, "plain", "any", head(x).T, y.T)
        found[method] = recall.mean(method, "plain")
    assert found["ridge"] > 0.15 and found["mlp"] > found["ridge"] + 0.2


@pytest.mark.parametrize("bad", [{"method": "magic"}, {"hidden": 0}, {"epochs": 0}, {"lr": float("nan")}])
def test_recipes_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        FitRecipe(**bad)


# -- the whole of it ------------------------------------------------------------------------------------


def job(method: str = "mlp") -> RetainingJob:
    recipe = FitRecipe(method=method, hidden=8, epochs=2, batch=64)  # type: ignore[arg-type]
    return RetainingJob(
        "tiny", digest(TEXT), prompts=4, held_out=2, shortest=400, longest=500, keep=60, dtype="float32", recipe=recipe
    )


def run(folder: Path, made: RetainingJob, on_progress: Callable[[str, int, int], None] = lambda *_: None) -> Any:
    adapter = tiny_llama(torch.float32)
    return train(made, adapter, kernel("reference"), byte_tokenizer(), TEXT, folder, on_progress)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    phases: list[str] = []
    whole = run(tmp_path / "whole", job(), lambda phase, done, total: phases.append(phase))
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["heads.safetensors", "job.json"]
    calls = len(phases)
    assert len(set(phases)) == 4  # labels, two fits, held-out prompts

    def killed_after(count: int) -> Callable[[str, int, int], None]:
        left = [count]

        def on_progress(phase: str, done: int, total: int) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        return on_progress

    kills = 0
    for count in range(2, calls, max(1, calls // 9)):
        try:
            done = run(tmp_path / "killed", job(), killed_after(count))
        except KeyboardInterrupt:
            kills += 1
            assert finished(tmp_path / "killed", job()) is None
        else:
            break
    assert kills >= 4
    found = finished(tmp_path / "killed", job())
    assert found is not None and found.recall == done.recall
    assert done.recall == whole.recall
    for a, b in zip(load(whole.file).layers, load(done.file).layers, strict=True):
        for name in ("fc1_WE", "bias_W", "fc2_KW"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-6, rtol=0)


def killed_by(count: int) -> Callable[[str, int, int], None]:
    left = iter(range(count))

    def on_progress(phase: str, done: int, total: int) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_progress


def killing(folder: Path, counts: tuple[int, ...]) -> None:
    """Train in processes that are killed after so many steps, one after another; runs in a process of its own."""
    for count in counts:
        child = os.fork()
        if not child:
            run(folder, job(), killed_by(count))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, f"it ended within {count} steps"


def test_a_process_that_gets_sigkill_again_and_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", job())
    call = f"killing(Path({str(tmp_path / 'killed')!r}), (3, 3, 12, 14))"
    code = f"from pathlib import Path; from tests.train.test_training import killing; {call}"
    # Forked only where no thread has run yet.
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    left = {p.name for p in (tmp_path / "killed").rglob("*.safetensors")}
    assert left and "heads.safetensors" not in left
    done = run(tmp_path / "killed", job())
    assert done.recall == whole.recall
    assert [p.name for p in (tmp_path / "killed").rglob("*.part")] == []
    for a, b in zip(load(whole.file).layers, load(done.file).layers, strict=True):
        for name in ("fc1_WE", "bias_W", "fc2_KW"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-6, rtol=0)


def test_ridge_needs_no_network_and_its_heads_are_used(tmp_path: Path) -> None:
    done = run(tmp_path, job("ridge"))
    assert set(done.recall) == {"ridge", "random"} and done.recall["ridge"]["plain"] > done.recall["random"]["plain"]
    heads = load(done.file)
    assert heads.layers[0].hidden == 0 and heads.about["method"] == "ridge"
    adapter = tiny_llama(torch.float32)
    heads.check(adapter.shape)
    scorer = compressor("retaining", heads=str(done.file))
    engine = tiny_engine(adapter, strategy("apb"), 3, scorer)
    assert engine.logits(engine.prefill(make_prompt(200))).isfinite().all()


def test_a_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, job(), stop)
    with pytest.raises(UserError, match="prompts=5"):
        run(tmp_path, dataclasses.replace(job(), prompts=5))


def stop(phase: str, done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_a_hidden_width_that_cannot_hold_the_start_is_refused(tmp_path: Path) -> None:
    small = dataclasses.replace(job(), recipe=FitRecipe(hidden=3))
    with pytest.raises(UserError, match="hidden=3"):
        run(tmp_path, small)
