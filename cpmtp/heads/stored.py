"""Heads in folders (a config and weights in safetensors, never a pickle) and on base models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_WEIGHTS = "model.safetensors"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SHOWN = ("form", "horizon", "rank", "transition_rank", "width", "hidden_size", "vocab_size")
_CARD = """---
library_name: cpmtp
tags: [speculative-decoding, multi-token-prediction]
---
# A draft head for {base}

It proposes several tokens per call of its base model{mine}.
It is {told} token. Decoding verifies what it proposes, so that the text follows the base model's
own distribution whatever that is. It is of no use with any other base model.

| size | |
|---|---|
{sizes}

`recipe.json` beside this file has the settings of its training, `metrics.csv` its course.

    lm = cpmtp.load_language_model("{base}")
    head = cpmtp.DraftHead.from_pretrained("path/of/this/folder")
    out = cpmtp.speculative_generate(lm, head, "Once", max_new_tokens=100)
    print(lm.decode(out.sequences[0]), out.stats.tokens_per_call)
"""
Head = TypeVar("Head", bound="StoredHead")


class StoredHead(PyTorchModelHubMixin):
    """`save_pretrained` and `from_pretrained` of a head, and the base model it reads."""

    hidden_size: int
    vocab_size: int
    base: str
    base_sha256: str
    tokenizer_sha256: str
    maps: Tensor
    unembedding: Tensor
    attached: tuple[tuple, tuple] | None
    vocabulary: list[int] | None
    kept: Tensor

    def attach(self: Head, lm: Any) -> Head:
        """Give the head its base model's embeddings; returns the head.

        Raises
        ------
        ValueError
            If the head was trained on another model or tokenizer.
        """
        known = (
            ("weights", self.base_sha256, ("fingerprint", "exact_fingerprint")),
            ("tokenizer", self.tokenizer_sha256, ("tokenizer_fingerprint",)),
        )
        for what, mine, names in known:
            # A head of no particular base is not worth reading all weights of this one.
            if mine and all(mine != getattr(lm, name) for name in names):
                its = getattr(lm, names[0])
                raise ValueError(
                    f"this head was trained on {self.base!r} ({what} {mine[:12]}), not on "
                    f"{lm.name!r} ({its[:12]}): load that base model, or train a head for this one"
                )
        return self.attach_weights(lm.unembedding, lm.embedding)

    def attach_weights(
        self: Head, unembedding: Float[Tensor, "vocab d"], embedding: Float[Tensor, "embedded d"]
    ) -> Head:
        """The same from bare matrices, (vocab, hidden) each."""
        expected = (self.vocab_size, self.hidden_size)
        # A model may embed more ids than it can write.
        if tuple(unembedding.shape) != expected or embedding.shape[0] < self.vocab_size:
            raise ValueError(
                f"a head over {expected} (vocab, hidden) does not fit an unembedding of "
                f"{tuple(unembedding.shape)} and an embedding of {tuple(embedding.shape)}"
            )
        mine = (self.maps.dtype, self.maps.device)
        given = tuple(
            (w, w.data_ptr(), None if w.is_inference() else w._version)
            for w in (unembedding, embedding)
        )
        if self.unembedding.numel() and self.attached is not None:
            known, before = self.attached
            if known == mine and all(a[1:] == b[1:] for a, b in zip(before, given, strict=True)):
                return self  # of the same weights as before: nothing is copied again
        self.attached = (mine, given)
        written = unembedding.detach().to(self.maps)
        self.unembedding = written if self.vocabulary is None else written[self.kept]
        self.embedding = embedding.detach().to(self.maps)
        return self

    @classmethod
    def from_pretrained(  # type: ignore[override]  # one name, and the mixin's options
        cls: type[Head], name: str | Path, **options: Any
    ) -> Head:
        """The head in a folder, or of the Hugging Face hub by OWNER/NAME.

        Raises
        ------
        ValueError
            If there is no such folder, or the name can be none of the hub's.
        """
        folder = Path(name)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(f"the folder {str(name)!r} holds no head: expected config.json in it")
        if not folder.is_dir() and not _HUB_ID.fullmatch(str(name)):
            raise ValueError(
                f"no folder {str(name)!r}: expected a folder of a head or a hub id (OWNER/NAME); "
                "embedded_heads(model) has the folders of those that come with a model"
            )
        return super().from_pretrained(name, **options)

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """What a stored head says of itself to people: README.md of its folder."""
        sizes = {name: getattr(self, name, None) for name in _SHOWN}
        told = "told the first" if getattr(self, "anchored", False) else "not told the first"
        lines = [f"| {name.replace('_', ' ')} | {v} |" for name, v in sizes.items() if v]
        mine = f" (weights {self.base_sha256[:12]})" if self.base_sha256 else ""
        return ModelCard(
            _CARD.format(base=self.base or "unknown", mine=mine, told=told, sizes="\n".join(lines))
        )

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id,
        revision,
        cache_dir,
        force_download,
        local_files_only,
        token,
        map_location="cpu",
        strict=True,
        **shape,
    ):
        # The mixin's own version would fall back to a pickle.
        file = Path(model_id) / _WEIGHTS
        if not Path(model_id).is_dir():
            options = {
                "revision": revision,
                "cache_dir": cache_dir,
                "force_download": force_download,
                "token": token,
            }
            file = Path(
                hf_hub_download(model_id, _WEIGHTS, local_files_only=local_files_only, **options)
            )
        shape.pop("config", None)
        try:
            head = cls(**shape)
        except TypeError:
            raise ValueError(
                f"the folder {str(model_id)!r} holds no head: its config.json has "
                f"{', '.join(shape) or 'nothing'} where a head's sizes are expected"
            ) from None
        try:
            weights = load_file(file, device=str(map_location))
            head.load_state_dict(
                {name: w.to(torch.float32) for name, w in weights.items()}, strict=True
            )
        except (SafetensorError, RuntimeError, OSError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{file} does not hold this head's weights: {first}") from error
        return head.eval()
