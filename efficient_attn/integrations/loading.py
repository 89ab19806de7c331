"""Loading a transformers model together with the swap that it was saved with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .swap import swap_attention


def load_swapped(path: str | Path, model_class: Any = None, **kwargs: Any) -> Any:
    """A swapped transformers model from what `save_pretrained` wrote, with the swap and its learnt parts.

    `from_pretrained` alone gives the model as it was before the swap, and warns of the keys that it does not know.

    Args:
        path: a directory, or the name of a model on the hub.
        model_class: of the model; the one that the config names, by default.
        kwargs: for `from_pretrained`.
    Raises:
        SwapError: if the model was saved without a swap, or its swap cannot be made again.
    """
    from .huggingface import saving

    model, mechanisms = saving.load(str(path), model_class, kwargs)
    swap_attention(model, lambda site: mechanisms.get(site.path), layers=list(mechanisms))
    saving.load_mechanisms(str(path), mechanisms, kwargs)
    return model
