"""The learned head: last hidden state (and, anchored, the known next token) to a CP distribution
over the tokens to come.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from cpmtp.drafts.blocks import CPBlock
from cpmtp.drafts.cp_distribution import CPDistribution

_WEIGHTS = "model.safetensors"


class CPHead(nn.Module, PyTorchModelHubMixin):
    """A rank-r CP distribution over the next n tokens, read off a base model's last hidden state.

    ``A_i[:, a] = softmax(U (h + M_ia z))`` and ``w = softmax(W z + b)``: h is the hidden state, U
    the base model's unembedding (shared, frozen, not part of the head), M_ia one linear map per
    position and component, and z the trunk's output. Without trunk ``z = h``. Rank 1 is the
    independent heads of Gloeckle et al. and of Medusa.

    An **anchored** head knows the first token: its trunk reads that token's embedding beside h, and
    it models the n - 1 tokens after it.

    Parameters
    ----------
    hidden_size, vocab_size : int
        Of the base model.
    horizon, rank : int
    anchored : bool
    width : int, optional
        Of the trunk's residual stream; default: `hidden_size`.
    blocks : int
        Residual blocks (normalise, four times as wide, SiLU, back) of the trunk.
    base, base_sha256, tokenizer_sha256 : str
        Whose hidden states the head reads; `attach` refuses any other.

    References
    ----------
    basharin2024faster, gloeckle2024better, cai2024medusa

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> head = CPHead(hidden_size=8, vocab_size=5, horizon=3, rank=2)
    >>> head = head.attach_weights(torch.randn(5, 8), torch.randn(5, 8))
    >>> head(torch.randn(4, 8)).to_tensor().shape
    torch.Size([4, 5, 5, 5])
    >>> head.draft(torch.randn(4, 8), torch.tensor([0, 1, 2, 3])).horizon
    2
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        horizon: int,
        rank: int,
        anchored: bool = False,
        width: int | None = None,
        blocks: int = 0,
        base: str = "",
        base_sha256: str = "",
        tokenizer_sha256: str = "",
    ):
        super().__init__()
        _check_shape(horizon, rank, blocks)
        self.hidden_size, self.vocab_size, self.horizon, self.rank = (
            hidden_size,
            vocab_size,
            horizon,
            rank,
        )
        self.anchored = anchored
        self.base, self.base_sha256, self.tokenizer_sha256 = base, base_sha256, tokenizer_sha256
        width = hidden_size if width is None else width
        self.plain = not (anchored or blocks or width != hidden_size)
        if not self.plain:
            self.enter = nn.Linear(hidden_size * (2 if anchored else 1), width, bias=False)
            self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
            self.norm = nn.RMSNorm(width)
        self.maps = nn.Parameter(
            torch.randn(self.drafted * rank, hidden_size, width) * 0.3 / width**0.5
        )
        self.mixture = nn.Linear(width, rank)
        nn.init.zeros_(self.mixture.weight)
        nn.init.zeros_(self.mixture.bias)
        self.register_buffer("unembedding", torch.empty(0), persistent=False)
        self.register_buffer("embedding", torch.empty(0), persistent=False)
        self._kept: tuple[tuple, Tensor] | None = None

    @property
    def drafted(self) -> int:
        """Positions the head models: all n, or, anchored, the n - 1 after the first."""
        return self.horizon - self.anchored

    def attach(self, lm: Any) -> CPHead:
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
        self, unembedding: Float[Tensor, "vocab d"], embedding: Float[Tensor, "vocab d"]
    ) -> CPHead:
        """The same from bare matrices, (vocab, hidden) each."""
        expected = (self.vocab_size, self.hidden_size)
        # A model may embed more ids than it can write.
        if tuple(unembedding.shape) != expected or embedding.shape[0] < self.vocab_size:
            raise ValueError(
                f"a head over {expected} (vocab, hidden) does not fit an unembedding of "
                f"{tuple(unembedding.shape)} and an embedding of {tuple(embedding.shape)}"
            )
        self.unembedding = unembedding.detach().to(self.maps)
        self.embedding = embedding.detach().to(self.maps)
        return self

    def forward(
        self, hidden: Float[Tensor, "*batch d"], first_token: Int[Tensor, "*batch"] | None = None
    ) -> CPDistribution:
        """The head's own distribution: over x_1 … x_n, or, anchored, over x_2 … x_n given
        `first_token`.
        """
        log_weights, logits = self.components(hidden, self.trunk(hidden, first_token))
        # factors (*batch, vocab, rank)
        return CPDistribution(log_weights.exp(), logits.softmax(-1).mT.unbind(-3))

    def draft(
        self, hidden: Float[Tensor, "*batch d"], first_token: Int[Tensor, "*batch"]
    ) -> CPDistribution:
        """The law of x_2 … x_n once x_1 is known: read off it (anchored) or by the posterior
        update.

        Parameters
        ----------
        hidden : (*batch, hidden) tensor
            The hidden state that predicted x_1.
        first_token : (*batch,) long tensor
            x_1.
        """
        weights, factors = self.draft_factors(hidden, first_token)
        return CPDistribution(weights, factors.mT.unbind(-3))  # factors (*batch, vocab, rank)

    def draft_factors(
        self, hidden: Float[Tensor, "*batch d"], first_token: Int[Tensor, "*batch"]
    ) -> tuple[Float[Tensor, "*batch rank"], Float[Tensor, "*batch rest rank vocab"]]:
        """What `draft` is made of, unchecked: a decoder asks for it at every call."""
        scores, logits = self.components(hidden, self.trunk(hidden, first_token))
        if not self.anchored:
            known = logits[..., 0, :, :]
            at = first_token[..., None, None].expand(*known.shape[:-1], 1)  # (*batch, rank, 1)
            # (*batch, rank)
            scores = scores + (known.gather(-1, at) - known.logsumexp(-1, keepdim=True)).squeeze(-1)
            logits = logits[..., 1:, :, :]
        return scores.softmax(-1), logits.softmax(-1)

    def block(
        self, hidden: Float[Tensor, "batch d"], first_token: Int[Tensor, " batch"]
    ) -> CPBlock:
        """What a decoder draws from and a forecast reads: the draft of each row, float64."""
        return CPBlock.of(*self.draft_factors(hidden.to(self.maps), first_token))

    def trunk(
        self, hidden: Float[Tensor, "*batch d"], first_token: Int[Tensor, "*batch"] | None
    ) -> Float[Tensor, "*batch width"]:
        """z: what maps and mixture weights read; an anchored head puts the token after each hidden
        state into it.
        """
        if self.unembedding.numel() == 0:
            raise ValueError("this head has no base model yet: call head.attach(lm) first")
        if self.plain:
            return hidden
        if self.anchored:
            if first_token is None:
                raise ValueError("an anchored head needs the first token beside the hidden state")
            hidden = torch.cat(  # (*batch, 2 d)
                [
                    hidden,
                    functional.rms_norm(self.embedding[first_token], self.embedding.shape[-1:]),
                ],
                -1,
            )
        z = self.enter(hidden)
        for block in self.blocks:
            z = z + block(z)
        return self.norm(z)

    def components(
        self, hidden: Float[Tensor, "*batch d"], trunk: Float[Tensor, "*batch width"]
    ) -> tuple[Float[Tensor, "*batch rank"], Float[Tensor, "*batch drafted rank vocab"]]:
        """Log-weights, and logits of every position and component."""
        log_weights = self.mixture(trunk).log_softmax(-1)
        shape = (self.drafted, self.rank)
        if self.vocab_size > self.hidden_size:
            # (*batch, drafted, rank, d)
            moved = functional.linear(trunk, self.maps.flatten(0, 1)).unflatten(
                -1, (*shape, self.hidden_size)
            )
            return log_weights, functional.linear(
                hidden[..., None, None, :] + moved, self.unembedding
            )
        # (*batch, drafted, rank, vocab)
        moved = functional.linear(trunk, self._projected_maps().flatten(0, 1)).unflatten(
            -1, (*shape, self.vocab_size)
        )
        return log_weights, functional.linear(hidden, self.unembedding)[..., None, None, :] + moved

    def _projected_maps(self) -> Tensor:
        """U M, over a vocabulary smaller than the hidden state the smaller matrix; kept for as long
        as nothing changes.
        """
        if torch.is_grad_enabled():
            return self.unembedding @ self.maps  # (maps, vocab, width)
        parts = (self.maps, self.unembedding)
        state = tuple((part.data_ptr(), part._version, part.dtype) for part in parts)
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self.unembedding @ self.maps)  # (maps, vocab, width)
        return self._kept[1]

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


class ResidualBlock(nn.Module):
    """Normalise, widen by four, SiLU, back; zero at the start of training."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, z: Tensor) -> Tensor:
        """What the block adds to `z`, (*batch, width)."""
        return self.down(functional.silu(self.up(self.norm(z))))


def _check_shape(horizon: int, rank: int, blocks: int) -> None:
    if horizon < 2:
        raise ValueError(
            f"horizon {horizon}: a head needs at least 2 tokens, the first comes from the target"
        )
    for name, value, least in (("rank", rank, 1), ("blocks", blocks, 0)):
        if value < least:
            raise ValueError(f"{name} {value}: expected at least {least}")
