"""Training of draft heads: answers in batches, unrolling, losses, the walk, and runs that are killed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from apb.draft import DraftHead, load, vocab
from apb.draft.eagle import EagleHead
from apb.layers.call import Call, plain
from apb.train import eagle
from apb.train.answers import FIRST, KEPT, REPEATED, Answer, answer
from apb.train.eagle import EagleJob, finished, train
from apb.train.features import FeatureSample, read, read_ids, write
from apb.train.folder import digest
from apb.train.questions import _SECTIONS, KINDS, Questions, _part
from apb.train.tutor import Tutor, TutorRecipe
from apb.train.unroll import Divergence, unroll, visible
from apb.train.walk import TreeSize, _Answers, accepted_length, walk
from burst.errors import UserError
from tests.support.tiny import VOCAB, byte_tokenizer, random_ids, tiny_llama

TEXT = "\n\n".join(f"The king of hill {i} sees the sea. Then he sees the stars of {i}." for i in range(200))


# -- answers --------------------------------------------------------------------------------------------


class Causal:
    """Plain attention over one whole sequence."""

    needs_projections = False

    def __call__(self, call: Call) -> Tensor:
        q, k, v, scale = plain(call)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def greedy(prompt: tuple[int, ...], longest: int, stop: int) -> tuple[list[int], Tensor]:
    """Return prompt and answer, every token from a pass over the whole sequence, and all features but the last."""
    adapter = tiny_llama(torch.float32)
    ids = list(prompt)
    with torch.inference_mode():
        while True:
            hidden = adapter.hidden(torch.tensor(ids), torch.arange(len(ids)), Causal())
            ids.append(int(adapter.head(hidden[-1:]).argmax()))
            if ids[-1] == stop or len(ids) == len(prompt) + longest:
                return ids, hidden


@pytest.mark.parametrize("common", [0, 1, KEPT - 1, KEPT + 1, 150])
def test_answers_of_a_batch_are_those_of_each_alone(common: int) -> None:
    before = random_ids(common, seed=99) if common else ()
    prompts = [random_ids(n, seed=n) for n in (3, 70, 12, 1, 40)]
    free = [greedy((*before, *p), 12, stop=-1)[0] for p in prompts]
    stop = free[1][common + 74]  # so that one answer ends early, and its row leaves the batch
    adapter, zeros = tiny_llama(torch.float32), [0.0] * 5
    got = answer(adapter, prompts, zeros, longest=12, stop_ids=(stop,), seed=0, features=True, before=before)
    assert len({len(a.ids) - a.prompt for a in got}) > 1
    for prompt, made in zip(prompts, got, strict=True):
        ids, features = greedy((*before, *prompt), 12, stop)
        kept = [i for i in range(len(ids)) if i < FIRST or i >= common - (KEPT - FIRST)]
        assert made.ids == [ids[i] for i in kept] and made.prompt == min(common, KEPT) + len(prompt)
        assert made.ended == (ids[-1] == stop) and made.features_SE is not None
        torch.testing.assert_close(made.features_SE, features[kept[:-1]], atol=1e-4, rtol=1e-4)


def test_sampled_answers_follow_seed_and_temperature() -> None:
    def sampled(temperature: float, seed: int) -> list[list[int]]:
        prompts = [random_ids(5, seed=1)] * 3
        made = answer(
            tiny_llama(torch.float32), prompts, [temperature] * 3, longest=8, stop_ids=(), seed=seed, features=False
        )
        return [a.ids for a in made]

    assert sampled(1.0, 0) == sampled(1.0, 0) != sampled(1.0, 1)
    assert len({tuple(ids) for ids in sampled(1.0, 0)}) == 3
    assert sampled(1e-4, 0)[0] == greedy(random_ids(5, seed=1), 8, -1)[0]


def test_an_answer_that_repeats_itself_is_cut() -> None:
    said = Answer(1, [5], None)
    once = list(range(10, 10 + REPEATED))
    assert all(said.add(i, (2,)) for i in [*once, *once[:-1]])
    assert not said.add(once[-1], (2,)) and said.circular and not said.ended
    short = Answer(1, [5], None)
    assert not short.add(2, (2,)) and short.ended and not short.circular


# -- questions ------------------------------------------------------------------------------------------


def test_held_out_questions_share_neither_templates_nor_words_nor_text() -> None:
    questions = Questions(TEXT, seed=0)
    for kind in KINDS:
        seen = {questions.question(i, kind).text for i in range(300)}
        held = {questions.question(i, kind, held_out=True).text for i in range(300)}
        assert not (seen & held) - {""} and len(seen) > 150
        assert not {*_part(_SECTIONS[kind], 6, True)} & {*_part(_SECTIONS[kind], 6, False)}
        again = Questions(TEXT, seed=0)
        assert again.question(7, kind) == questions.question(7, kind)
    passages = [questions.question(i, "text", held_out=True).text.rpartition("\n\n")[0] for i in range(20)]
    assert all(p in TEXT[round(len(TEXT) * 0.9) :] for p in passages)
    assert all(not q.open and q.text for q in questions.free())


# -- the head over sequences ----------------------------------------------------------------------------


def head_of(window: int | None, sinks: int) -> EagleHead:
    target = tiny_llama(torch.float64).draft_target()
    return EagleHead.fresh(target, window=window, sinks=sinks, seed=2).double().requires_grad_(False)


def test_who_is_visible() -> None:
    positions = [0, 1, 2, 50, 51, 52, 53]
    seen = visible(torch.tensor(positions), 3, 2)
    for i, a in enumerate(positions):
        for j, b in enumerate(positions):
            assert bool(seen[i, j]) == (j <= i and (a - b < 3 or b < 2))
    assert bool((visible(torch.arange(5), None, 0) == torch.ones(5, 5, dtype=torch.bool).tril()).all())


def chain(head: DraftHead, hidden: Tensor, ids: list[int], positions: list[int], own: int) -> Tensor:
    """Return the last row's output (E,); the last ``own`` rows read the output before them instead of ``hidden``."""
    rows = [hidden[i] for i in range(len(ids))]
    out = torch.empty(0)
    for last in range(len(ids) - own, len(ids) + 1):
        if last > len(ids) - own:
            rows[last - 1] = out
        seen = visible(torch.tensor(positions[:last]), head.window, head.sinks)

        def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor = seen) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

        out = head.step(
            torch.stack(rows[:last])[None], torch.tensor(ids[:last])[None], torch.tensor(positions[:last]), attend
        )[0, -1]
    return out


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (4, 2)])
def test_unrolled_rows_are_those_of_a_chain(window: int | None, sinks: int) -> None:
    head = head_of(window, sinks)
    hidden = torch.randn(
        1, 10, head.target.shape.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    ids, positions = list(random_ids(10, seed=4)), [0, 1, 2, 300, 301, 302, 303, 304, 305, 306]
    for step, out in enumerate(unroll(head, hidden, torch.tensor(ids)[None], torch.tensor(positions), 3)):
        for t in range(step, 10):
            expected = chain(head, hidden[0], ids[: t + 1], positions[: t + 1], step)
            torch.testing.assert_close(out[0, t], expected, atol=1e-6, rtol=1e-6)


def test_divergence_and_its_gradient() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 8, generator=rng)
    out = torch.randn(300, 8, generator=rng).requires_grad_()  # more than are done at once
    feature = torch.randn(300, 8, generator=rng)
    loss = Divergence.apply(out, feature, rows, None, 0.5, None)
    (loss * torch.arange(300)).sum().backward()
    got, out.grad = out.grad, None
    p, q = ((x @ rows.T * 0.5).log_softmax(-1) for x in (feature, out))
    expected = (p.exp() * (p - q)).sum(-1)
    (expected * torch.arange(300)).sum().backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got, out.grad, atol=1e-3, rtol=1e-4)


# -- the walk -------------------------------------------------------------------------------------------


def drafted(head: DraftHead, hidden: Tensor, ids: list[int], at: int, size: TreeSize) -> set[tuple[int, ...]]:
    """Return the paths of an EAGLE-2 tree behind the pair ``at``, every node from a pass over its whole sequence."""
    pool: list[tuple[float, tuple[int, ...]]] = []
    frontier: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for _ in range(size.depth):
        children = []
        for score, path in frontier:
            tokens = [*ids[1 : at + 2], *path]
            rows = torch.cat([hidden[: at + 1], torch.zeros(len(path), hidden.shape[1], dtype=hidden.dtype)])
            out = chain(head, rows, tokens, list(range(len(tokens))), len(path))
            best = head.logits(out[None, None])[0, 0].log_softmax(-1).topk(size.top_k)
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                children.append((score + value, (*path, int(head.ids_V[index]))))
        pool += children
        frontier = sorted(children, key=lambda c: -c[0])[: size.top_k]
    return {path for _, path in sorted(pool, key=lambda c: -c[0])[: size.tokens - 1]}


def walked(head: DraftHead, sample: FeatureSample, size: TreeSize) -> int:
    """Return the number of steps, with trees written out."""
    ids, at, steps = sample.ids_S.tolist(), sample.prompt - 1, 0
    while at + 1 < len(ids) - 1:
        paths = drafted(head, sample.features_SE.double(), ids, at, size)
        rest = tuple(ids[at + 2 :])
        right = max((len(p) for p in paths if p == rest[: len(p)]), default=0)
        at, steps = min(at + 1 + right, len(ids) - 2), steps + 1
    return steps


def followed(head: DraftHead, seed: int, tokens: int) -> FeatureSample:
    """Return an answer that goes on as the head guesses, or nearly: else nothing would ever be accepted."""
    rng = random.Random(seed)
    hidden = torch.randn(
        tokens, head.target.shape.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    ids = list(random_ids(4, seed=seed))
    while len(ids) < tokens:
        at = len(ids) - 2
        out = chain(head, hidden[: at + 1], ids[1:], list(range(at + 1)), 0)
        ids.append(int(head.ids_V[head.logits(out[None, None])[0, 0].topk(4).indices[rng.choice((0, 0, 0, 1, 3))]]))
        hidden[at + 1] = out + 0.02 * hidden[at + 1]  # nearly what the head expects, so that guesses hold for a while
    return FeatureSample("general", "", 4, torch.tensor(ids, dtype=torch.int32), hidden, False)


@pytest.mark.parametrize("window", [None, 5])
def test_the_walk_is_that_of_trees_written_out(window: int | None) -> None:
    head = head_of(window, 2).with_vocab(torch.arange(0, VOCAB, 40))
    size = TreeSize(depth=3, top_k=2, tokens=7)
    samples = [followed(head, seed, tokens) for seed, tokens in ((1, 20), (2, 13), (3, 17))]
    found = walk(head, samples, size)
    assert [w.tokens for w in found] == [15, 8, 12]
    assert [w.steps for w in found] == [walked(head, s, size) for s in samples]
    assert accepted_length(found) > 1.2  # some guesses were right
    chain_of_one = walk(head, samples, TreeSize(depth=1, top_k=1, tokens=2))
    assert sum(w.steps for w in chain_of_one) > sum(w.steps for w in found)


@pytest.mark.parametrize("sinks", [0, FIRST - 1])
def test_the_walk_behind_tokens_that_a_sample_lacks(sinks: int) -> None:
    head = head_of(5, sinks).with_vocab(torch.arange(0, VOCAB, 40))
    whole = [dataclasses.replace(followed(head, seed, 60), prompt=40) for seed in range(6)]
    rows = [*range(FIRST), *range(FIRST + 20, 60)]
    short = [dataclasses.replace(s, prompt=20, ids_S=s.ids_S[rows], features_SE=s.features_SE[rows]) for s in whole]
    size = TreeSize(depth=3, top_k=2, tokens=7)
    found = walk(head, whole, size)
    assert walk(head, short, size, hidden=20) == found and accepted_length(found) > 1.2
    answer = _Answers(head, whole, 0).out_BSE[:, 40:]
    torch.testing.assert_close(_Answers(head, short, 20).out_BSE[:, 20:], answer)
    assert sinks == 0 or not torch.allclose(_Answers(head, short, 0).out_BSE[:, 20:], answer)  # their distance matters


def test_a_vocabulary_of_its_own_for_each_answer() -> None:
    head = head_of(None, 0)
    few = torch.arange(0, VOCAB, 40)
    small = head.with_vocab(few)
    samples = [followed(small, seed, 14) for seed in (5, 6)]
    size = TreeSize(depth=3, top_k=2, tokens=7)
    assert walk(head, samples, size, lambda s: few) == walk(small, samples, size)
    none = walk(head, samples, size, lambda s: torch.arange(1, VOCAB, 40))
    assert all(w.steps == w.tokens for w in none)  # nothing that is said can be drafted


# -- the whole of it ------------------------------------------------------------------------------------


def job(**changes: Any) -> EagleJob:
    recipe = TutorRecipe(epochs=4, batch=300, vocab=100, negatives=20, unrolled=0.5, depth=2)
    made = EagleJob("tiny", digest(TEXT), prompts=5, held_out=2, longest=16, window=32, dtype="float32", recipe=recipe)
    return dataclasses.replace(made, **changes)


def run(folder: Path, made: EagleJob, on_progress: Callable[[str, int, int], None] = lambda *_: None) -> Any:
    return train(made, tiny_llama(torch.float32), byte_tokenizer(), (1,), TEXT, folder, on_progress)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eagle, "_EVERY", 2)
    phases: list[str] = []
    whole = run(tmp_path / "whole", job(), lambda phase, done, total: phases.append(phase))
    names = ["answers.safetensors", "head.freq.safetensors", "head.safetensors", "job.json"]
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == names
    assert len(set(phases)) == 4 and phases.count("Training the head") > 4

    def killed_after(count: int) -> Callable[[str, int, int], None]:
        left = [count]

        def on_progress(phase: str, done: int, total: int) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        return on_progress

    kills = 0
    for count in range(2, 60, 5):
        try:
            done = run(tmp_path / "killed", job(), killed_after(count))
        except KeyboardInterrupt:
            kills += 1
            assert finished(tmp_path / "killed", job()) is None
        else:
            break
    assert kills >= 3
    found = finished(tmp_path / "killed", job())
    assert found is not None and found.accepted == done.accepted == whole.accepted
    for name in names[:3]:
        one, other = (load_file(folder / name) for folder in (tmp_path / "whole", tmp_path / "killed"))
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=0, rtol=0, msg=f"{name} {key}")
    head = load(whole.file, tiny_llama(torch.float32).draft_target())
    assert head.window == 32 and head.about["model"] == "tiny"
    ranked = vocab.load(whole.ranked, VOCAB, (1,))
    assert len(ranked) == VOCAB and int(ranked[0]) == 1
    with pytest.raises(UserError, match="another job"):
        run(tmp_path / "whole", job(prompts=6))


def test_training_lowers_the_loss_and_lengthens_the_walk(tmp_path: Path) -> None:
    target = tiny_llama(torch.float32).draft_target()
    prompts = [random_ids(6, seed=i) for i in range(8)]
    made = answer(tiny_llama(torch.float32), prompts, [0.0] * 8, longest=24, stop_ids=(), seed=0, features=True)
    write(tmp_path / "f.safetensors", made, ["general"] * 8, [""] * 8)
    samples = read(tmp_path / "f.safetensors")
    ranked = vocab.rank(vocab.count(read_ids(tmp_path / "f.safetensors"), VOCAB), ())
    losses: list[float] = []
    recipe = TutorRecipe(epochs=60, batch=200, lr=1e-2, vocab=400, noise=0.0, unrolled=0.0)
    tutor = Tutor(recipe, target, samples, ranked, 32, 2)
    before = accepted_length(walk(tutor.head, samples, TreeSize()))
    head = tutor.run(tmp_path / "checkpoint.pt", 1000, lambda done, total, loss: losses.append(loss))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert accepted_length(walk(head, samples, TreeSize())) > before + 0.5


def test_training_goes_on_from_a_head_with_biases() -> None:
    adapter = tiny_llama(torch.float32)
    target = adapter.draft_target()
    fresh = EagleHead.fresh(target, window=32, sinks=2)
    start = EagleHead(dataclasses.replace(fresh._shape, qkv_bias=True), target, fc_bias=True, window=None, sinks=0)
    made = answer(adapter, [random_ids(6, seed=1)], [0.0], longest=12, stop_ids=(), seed=0, features=True)
    assert made[0].features_SE is not None
    sample = FeatureSample("general", "", 6, torch.tensor(made[0].ids[:-1]), made[0].features_SE, False)
    tutor = Tutor(TutorRecipe(epochs=1), target, [sample], torch.arange(VOCAB), 32, 2, start)
    begun = dict(tutor.head.state_dict())
    assert (tutor.head.window, tutor.head.sinks) == (32, 2)
    torch.testing.assert_close(begun, dict(start.state_dict()))
    assert tutor._train([0]) > 0 and not torch.equal(begun["fc.bias"], tutor.head.state_dict()["fc.bias"])


@pytest.mark.parametrize("bad", [{"epochs": 0}, {"lr": float("nan")}, {"unrolled": 1.5}, {"depth": 0}])
def test_recipes_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        TutorRecipe(**bad)


@pytest.mark.parametrize("bad", [{"prompts": 0}, {"longest": 2}, {"window": 1}, {"sinks": -1}, {"seed": -1}])
def test_jobs_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="out of range"):
        job(**bad)
