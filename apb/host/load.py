"""Loading: a model and its draft head, adapted, as a host's specification names them."""

from __future__ import annotations

from pathlib import Path

from apb.host.messages import HostSpec
from apb.models.adapter import Adapter


def load_adapter(spec: HostSpec) -> Adapter:
    """Load the model that ``spec`` names, adapted, and its draft head.

    Raises UserError for unsupported models and files that cannot be loaded.
    """
    from apb.models.loading import generation_stop_ids, load_config, load_model, random_model
    from apb.models.placement import torch_dtype
    from apb.models.shape import model_shape
    from apb.models.yarn import with_yarn

    if spec.config is not None:
        random = random_model(spec.config, dtype=spec.dtype, device=spec.device, yarn=spec.yarn)
        return Adapter(random, model_shape(random.config, torch_dtype(spec.dtype)))
    path = Path(spec.model_path)
    config = with_yarn(load_config(path), spec.yarn)
    model = load_model(path, dtype=spec.dtype, device=spec.device, yarn=spec.yarn)
    if model.device.type == "cpu":
        for parameter in model.parameters():
            parameter.detach().sum()  # mapped files are read now, while loading, not within the first prefill
    adapter = Adapter(model, model_shape(config, torch_dtype(spec.dtype)))
    if spec.draft is not None:
        adapter.draft = spec.draft.load(adapter.draft_target(), generation_stop_ids(path))
    return adapter
