"""flash-attn 3 or 4 where one is installed: torch puts their kernels behind the flash operators that ``cuda`` calls.

flash-attn 2 would add nothing: torch's own operators are built from it. The choice holds for the whole process.

Shapes: B batch, H query heads, K kv heads, S queries, T keys, D head dim, E value dim.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

from burst.errors import UserError
from burst.kernels import cuda, soft_cap
from burst.kernels.base import Backward, Forward, Rows, backend

# By the device's major capability: FA3 is written for Hopper, FA4 for Blackwell (on Hopper it may not split its work).
CHOICES = {9: "FA3", 10: "FA4"}
FA4_MAX_CAPPED_DIM = 192  # its kernels of dim 256 for capability 10 know no soft cap


@cache
def installed() -> tuple[str, ...]:
    """Return which of the implementations are there; none is imported, a broken one harms nobody who asks."""
    found = {"FA3": importlib.util.find_spec("flash_attn_interface") is not None, "FA4": _has_fa4()}
    return tuple(name for name, there in found.items() if there)


def best(device: torch.device) -> str | None:
    """Return the implementation for a CUDA device; None: torch's own."""
    found = installed()
    name = CHOICES.get(torch.cuda.get_device_capability(device)[0]) if found else None
    return name if name in found else None


def attend(q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """As ``cuda.attend``, by flash-attn's kernels; raises UserError where there are none for the device."""
    _activate(q_BHSD.device)
    return cuda.attend(q_BHSD, k_BKTD, v_BKTE, causal, scale)


def backward(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, rows: Rows, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``cuda.backward``, by flash-attn's kernels."""
    _activate(q_BHSD.device)
    return cuda.backward(q_BHSD, k_BKTD, v_BKTE, rows, causal, scale)


def capped(cap: float) -> tuple[Forward, Backward]:
    """Return the kernels' forward and backward with their own soft cap, which torch's operators do not pass on."""
    return partial(_attend_capped, cap), partial(_backward_capped, cap)


def _attend_capped(
    cap: float, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Call FA3's op, or FA4's function, as torch does, (B, S, H, D); tiles of plain torch for what they do not take."""
    _activate(q_BHSD.device)
    name, dim = best(q_BHSD.device), v_BKTE.shape[3]
    if not _takes_cap(name, q_BHSD, v_BKTE):
        return soft_cap.attend(cap, q_BHSD, k_BKTD, v_BKTE, causal, scale)
    q, k, v = (x.transpose(1, 2) for x in cuda.flash_inputs(q_BHSD, k_BKTD, v_BKTE))
    if name == "FA3":
        out, lse = torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=scale, is_causal=causal, softcap=cap)[:2]
    else:
        run = importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd
        out, lse = run(q, k, v, softmax_scale=scale, causal=causal, softcap=cap, return_lse=True)[:2]
    return out.transpose(1, 2)[..., :dim], lse.contiguous()


def _backward_capped(
    cap: float, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, rows: Rows, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    _activate(q_BHSD.device)
    name, dim, value_dim = best(q_BHSD.device), q_BHSD.shape[3], v_BKTE.shape[3]
    if not _takes_cap(name, q_BHSD, v_BKTE):
        return soft_cap.backward(cap, q_BHSD, k_BKTD, v_BKTE, rows, causal, scale)
    given = (q_BHSD, k_BKTD, v_BKTE, rows.with_out(), rows.dout)
    q, k, v, out, dout = (x.transpose(1, 2) for x in cuda.flash_inputs(*given))
    lse_BHS = rows.lse.contiguous()
    if name == "FA3":
        grads = [torch.empty_like(x) for x in (q, k, v)]
        options = {"softmax_scale": scale, "is_causal": causal, "softcap": cap}
        torch.ops.flash_attn_3.bwd(dout, q, k, v, out, lse_BHS, *grads, **options)
    else:
        run = importlib.import_module("flash_attn.cute.interface")._flash_attn_bwd
        grads = run(q, k, v, out, dout, lse_BHS, softmax_scale=scale, causal=causal, softcap=cap)[:3]
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq[..., :dim], dk[..., :dim], dv[..., :value_dim]


def _takes_cap(name: str | None, q_BHSD: Tensor, v_BKTE: Tensor) -> bool:
    return cuda.takes_flash(q_BHSD, v_BKTE) and (name == "FA3" or q_BHSD.shape[3] <= FA4_MAX_CAPPED_DIM)


@cache
def _activate(device: torch.device) -> None:
    name = best(device)
    if name is None:
        raise UserError(
            "kernel 'flash_attn': no flash-attn 3 or 4 for this device",
            given=f"{device}, installed: {', '.join(installed()) or 'none'}",
            allowed="FA3 on capability 9, FA4 on 10",
            remedy="Install one of them, or choose the kernel 'auto'.",
        )
    if current_flash_attention_impl() != name:
        activate_flash_attention_impl(name)


def _has_fa4() -> bool:
    # Asking for the spec of flash_attn.cute would import flash_attn. Wheels of flash-attn 2 may carry that folder, too,
    # but not what it is written in, cutlass.
    package = importlib.util.find_spec("flash_attn")
    folders = (package.submodule_search_locations or ()) if package is not None else ()
    if not any((Path(folder) / "cute" / "interface.py").is_file() for folder in folders):
        return False
    return importlib.util.find_spec("cutlass") is not None


KERNEL = backend(
    "flash_attn", "flash-attn 3 or 4 where one is installed", attend, backward, device="cuda", capped=capped
)
