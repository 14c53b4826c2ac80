"""Heads in folders (a config and weights in safetensors, never a pickle) and on base models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_WEIGHTS = "model.safetensors"
Head = TypeVar("Head", bound="StoredHead")


class StoredHead(PyTorchModelHubMixin):
    """`save_pretrained` and `from_pretrained` of a head, and the base model it reads."""

    hidden_size: int
    vocab_size: int
    base: str
    base_sha256: str
    tokenizer_sha256: str
    maps: Tensor
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
        written = unembedding.detach().to(self.maps)
        self.unembedding = written if self.vocabulary is None else written[self.kept]
        self.embedding = embedding.detach().to(self.maps)
        return self

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
        head = cls(**shape)
        try:
            weights = load_file(file, device=str(map_location))
            head.load_state_dict(
                {name: w.to(torch.float32) for name, w in weights.items()}, strict=True
            )
        except (SafetensorError, RuntimeError, OSError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{file} does not hold this head's weights: {first}") from error
        return head.eval()
