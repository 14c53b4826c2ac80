"""Views of one transformers model: its trunk, what it makes of hidden states, other attention.

Views share the model's weights. Nothing of the model itself is switched, so that several threads
may use it at once.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cpmtp.tree_attention import attend_in_tree

_TREE_ATTENTION = "cpmtp_tree"
# What some architectures ask of their attention beyond softmax over all they see.
_ATTENTION_VARIANTS = ("softcap", "s_aux", "sliding_window", "position_bias", "alibi")


def trunk_name(model: Any) -> str:
    """Name of the part that turns token ids into last hidden states: the model's largest child.

    Raises
    ------
    ValueError
        If the model has no parts.
    """
    for name, child in model.named_children():
        if child is model.base_model:
            return name
    sizes = {n: sum(p.numel() for p in c.parameters()) for n, c in model.named_children()}
    if not sizes:
        raise ValueError(f"a {type(model).__name__} has no parts: expected a causal language model")
    return max(sizes, key=lambda name: sizes[name])


def head_only(model: Any) -> Any:
    """The model with its trunk taken out: called with hidden states as `inputs_embeds`.

    It gives the logits that the model itself would make of them, scaled, capped or transformed as
    they may be.
    """
    view = copy.copy(model)
    view._modules = dict(model._modules)
    view._modules[trunk_name(model)] = _Given()
    return view


class _Given(nn.Module):
    """A trunk that answers with what it is given."""

    def forward(self, *ignored, inputs_embeds: Tensor, **options) -> _TrunkOutput:
        return _TrunkOutput(inputs_embeds)


class _TrunkOutput:
    """What a trunk returns, with nothing in it but the hidden states."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index) -> Any:
        return (self.last_hidden_state,)[index]


def with_tree_attention(model: Any) -> Any:
    """The model with attention over a tree of tokens in place of its own.

    Raises
    ------
    ValueError
        If the model's attention cannot be replaced.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    view = copy.deepcopy(model, shared)
    view.set_attn_implementation(_TREE_ATTENTION)
    return view


def in_float32(model: Any) -> Any:
    """A copy of the model in single precision: weights of its own."""
    twin = copy.deepcopy(model).to(torch.float32)
    # Some caches take their precision from here.
    for config in (twin.config, twin.config.get_text_config()):
        config.dtype = torch.float32
    return twin


def _tree_attention_forward(module, query, key, value, attention_mask, scaling=None, **options):
    """`attend_in_tree` behind the interface of transformers' attention functions."""
    unknown = [name for name in _ATTENTION_VARIANTS if options.get(name) is not None]
    if unknown or attention_mask is None or attention_mask.is_floating_point():
        raise NotImplementedError(
            f"attention over a tree of tokens knows no {', '.join(unknown) or 'such mask'}"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_in_tree(query, key, value, attention_mask, scaling), None


AttentionInterface.register(_TREE_ATTENTION, _tree_attention_forward)
