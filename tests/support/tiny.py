"""Tiny random models, and engines over them without any file: what most tests of the framework start from."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from apb.clusters.virtual import VirtualCluster
from apb.compress import Compressor, compressor
from apb.engine.engine import Engine
from apb.engine.setup import Setup
from apb.host.host import Host
from apb.host.messages import HostSpec
from apb.kv.cache import HostCache
from apb.layers.full import FullCache
from apb.layers.rows import LayerKV
from apb.models.adapter import Adapter
from apb.models.shape import model_shape
from apb.prompt.prompt import Prompt, Question
from apb.strategies import Strategy
from burst.transport import VirtualWorld

VOCAB = 2400  # more than any test's context has tokens: no token need appear twice
# Far from zero, so that attention is far from uniform and a wrong mask shows.
INIT = 0.25


def llama_config(**changes: Any) -> LlamaConfig:
    """Return a Llama of three layers, 4 query and 2 kv heads."""
    options = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "initializer_range": INIT,
    }
    return LlamaConfig(**(options | changes))


def build(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a random model; from_config would keep, and change, the very object it is given."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # norms start at one: keys that are normalised would all be equally long
                weight.mul_(torch.empty_like(weight).uniform_(0.5, 1.5))
    return model.to(dtype).eval()


def adapt(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Adapter:
    """Return the same random model behind an adapter."""
    return Adapter(build(config, dtype, seed), model_shape(copy.deepcopy(config), dtype))


@functools.cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of some 300 tokens with a chat template: any text survives it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(["the king of the hill sees the sea and the stars"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}bot:",
    )


@functools.cache
def tiny_llama(dtype: torch.dtype) -> Adapter:
    """Return the adapter that most tests share."""
    return adapt(llama_config(), dtype)


def rotation(adapter: Adapter) -> Callable[[Tensor, int, int], Tensor]:
    """Return rotation of a layer's queries by ``delta`` positions, written out.

    Most architectures turn the pairs (i, i + half), GLM (2i, 2i + 1); dimensions beyond the rotary ones
    are left alone, and by SmolLM3 whole layers. Angles are fp32 as in transformers, so that selections
    cannot differ by them.
    """
    config = adapter._model.config
    rotary = adapter._model.base_model.rotary_emb

    def rotate(x: Tensor, delta: int, layer: int) -> Tensor:
        if not (getattr(config, "no_rope_layers", None) or [1] * (layer + 1))[layer]:
            return x
        angle = float(delta) * rotary.inv_freq.float()
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        half = len(angle)
        rest = x[..., 2 * half :]
        if config.model_type == "glm":
            a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = x[..., :half], x[..., half : 2 * half]
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([turned, rest], dim=-1)

    return rotate


def random_ids(count: int, seed: int, vocab: int = VOCAB) -> tuple[int, ...]:
    """Return that many token ids, no two alike: equal tokens' keys are equally long, a tie for norms."""
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(vocab, generator=gen)[:count].tolist())


def make_prompt(context: int, head: int = 5, question: int = 6, before: int = 2, after: int = 3) -> Prompt:
    """Return a random prompt of those lengths; ``question`` 0 gives one without a question."""
    asked = Question(random_ids(before, 1), random_ids(question, 2), random_ids(after, 3), None)
    return Prompt(random_ids(context, 4), head, asked if question else None)


def shards(cache: HostCache) -> list[LayerKV]:
    """Return a host's rows of the context, by layer."""
    return [cast("FullCache", layer).context for layer in cache.layers]


class TinyCluster(VirtualCluster):
    """Virtual hosts over a model that is here already."""

    def __init__(self, adapter: Adapter, hosts: int, tokenizer: Any = None, **options: Any) -> None:
        name = str(adapter.dtype).removeprefix("torch.")
        spec = HostSpec("tiny", name, "cpu")
        self.hosts, self.epoch = hosts, 0
        self._threads_before = torch.get_num_threads()
        self._world = VirtualWorld(hosts, **options)
        self._hosts = [Host(spec, t, adapter) for t in self._world.transports]
        for host in self._hosts:
            host._tokenizer = tokenizer or byte_tokenizer()

    def host(self, rank: int) -> Host:
        """Return one host, to look into it."""
        return self._hosts[rank]

    @property
    def world(self) -> VirtualWorld:
        """The hosts' transports."""
        return self._world


class TinyEngine(Engine):
    """An engine whose stop tokens are given instead of read from a folder."""

    stop_ids: tuple[int, ...] = ()

    def _stop_ids(self) -> tuple[int, ...]:
        return self.stop_ids


def tiny_engine(
    adapter: Adapter,
    strategy: Strategy,
    hosts: int,
    compress: str | Compressor | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> TinyEngine:
    """Return an engine of virtual hosts over a model that is here already."""
    cluster = TinyCluster(adapter, hosts, tokenizer, **options)
    scorer = compressor(compress) if isinstance(compress, str) else compress
    words = tokenizer or byte_tokenizer()
    setup = Setup(cluster.host(0).spec, adapter.shape, words, strategy, scorer, hosts)
    return TinyEngine(setup, cluster)


def saved_llama(folder: Path, **changes: Any) -> str:
    """Write the random Llama and a tokenizer into a folder, for hosts that load it themselves; return its name."""
    build(llama_config(max_position_embeddings=65536, **changes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
