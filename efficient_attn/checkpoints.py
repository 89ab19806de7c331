"""Loading a state: whole or not at all, and never one of a newer layout or a damaged one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Loadable(nn.Module):
    """A module that is as it was when its `load_state_dict` fails, and that knows the version of its layout.

    torch copies what fits and raises afterwards. Its state dicts carry the version of each module; one without a
    version (safetensors keeps none) is read as it stands.
    """

    _version = 1

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, but nothing is loaded if anything is wrong.

        Raises:
            RuntimeError: naming the keys that are missing, unexpected, of another shape, or damaged: a buffer
                that holds NaN or infinity, which no training can have put there; or a newer version's state.
        """
        with _restored_on_failure(self):
            return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        errors = [f"{prefix}{name} is damaged: not finite" for name in self._damaged(state_dict, prefix)]
        version = local_metadata.get("version")
        if version is not None and version > self._version:
            errors = [
                f"{prefix.rstrip('.') or type(self).__name__} is of version {version}, this efficient_attn reads "
                f"up to {self._version}: a newer one wrote it"
            ]
        if errors:
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _damaged(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """The own buffers whose loaded values would not be finite."""
        found = {name: state_dict.get(prefix + name) for name in self._buffers}
        return [
            name
            for name, x in found.items()
            if isinstance(x, torch.Tensor) and not x.is_meta and not torch.isfinite(x).all()
        ]


@contextmanager
def _restored_on_failure(module: nn.Module) -> Iterator[None]:
    holders: list[dict[str, Any]] = [
        holder for m in module.modules() for holder in (m._parameters, m._buffers)
    ]
    before = [(holder, dict(holder)) for holder in holders]
    values = [(x, x.detach().clone()) for holder in holders for x in holder.values() if x is not None]
    try:
        yield
    except Exception:
        for holder, held in before:
            holder.update(held)
        with torch.no_grad():
            for x, value in values:
                x.copy_(value)
        raise
