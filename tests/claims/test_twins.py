"""star, apb and spava equal their dense masked twins on the real model, on every kind of cluster; ledger = plan."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from apb.host.load import load_adapter
from apb.models.adapter import Adapter
from tests.claims.conftest import Claims, most
from tests.claims.ranks import QUESTION, TWIN_LENGTHS, TWINS, document, on_cpu, torchrun, twins
from tests.support.twin import twin

LOGITS_ATOL = 1e-4
HOSTS = range(1, 9)


@functools.cache
def oracle(model: str) -> Adapter:
    return load_adapter(on_cpu(model).spec)


@functools.cache
def wanted(model: str, hosts: int) -> dict[str, Tensor]:
    adapter = oracle(model)

    def rotate(x_HSD: Tensor, delta: int, layer: int) -> Tensor:
        return adapter.rotate(x_HSD[None], delta, layer)[0]

    found = {}
    for strategy in TWINS:
        setup = on_cpu(model, hosts=hosts, strategy=strategy)
        select = "query" if setup.compressor is not None else None
        for tokens in TWIN_LENGTHS:
            prompt = setup.prompt(document(setup, tokens), QUESTION)
            found[f"{strategy}/{tokens}"] = twin(adapter, rotate, prompt, strategy, hosts, select=select).logits
    return found


def compared(model: str, hosts: int, found: Mapping[str, tuple[Tensor, bool]], case: str) -> dict[str, Any]:
    logits, books = found[case]
    error = (logits - wanted(model, hosts)[case]).abs().max().item()
    return {"ok": error <= LOGITS_ATOL and books, "logits_error": error, "ledger_equals_plan": books}


@pytest.mark.parametrize("cluster", ["virtual", "gloo", "ray"])
def test_strategies_equal_their_dense_twins(claims: Claims, cluster: str) -> None:
    for hosts in HOSTS:
        keys = {f"{s}/{n}": f"twins/{cluster}/{hosts}/{s}/{n}" for s in TWINS for n in TWIN_LENGTHS}
        if all(key in claims for key in keys.values()):
            continue
        found = torchrun(hosts, "twins", claims.model) if cluster == "gloo" else twins(hosts, claims.model, cluster)
        for case, key in keys.items():
            claims.sample(key, partial(compared, claims.model, hosts, found, case))
    rows = claims.under(f"twins/{cluster}/")
    books = all(row["ledger_equals_plan"] for row in rows)
    claims.conclude(f"twins/{cluster}", max_logits_error=most(rows, "logits_error"), ledger_equals_plan=books)
