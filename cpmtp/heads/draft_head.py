"""The learned head: last hidden state (and, anchored, the known next token) to a distribution of
the tokens to come, of any form on one trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cpmtp.drafts.cp_distribution import CPDistribution
from cpmtp.drafts.markov_mixture import MarkovMixture
from cpmtp.drafts.support import Support
from cpmtp.heads.features import Features
from cpmtp.heads.shape import HeadSizes, checked_vocabulary
from cpmtp.heads.stored import StoredHead
from cpmtp.heads.trunk import Norm, RecurrentStep, ResidualBlock, TextLayer
from cpmtp.joint_distribution.habits import knows_habits

_FIRST_LEFT = 0.3  # standard deviation of left factors at the start


@knows_habits
class DraftHead(nn.Module, StoredHead):
    """A distribution over the next n tokens, read off a base model's last hidden state.

    ``Q(x) = sum_a w_a softmax(U_1a)[x_1] prod_i softmax(U_ia + <L[x_{i-1}] * g_i, R>)[x_i]`` with
    ``U_ia = U (h + M_ia z)`` and ``w = softmax(W z + b)``: h is the hidden state, U the base
    model's unembedding (shared, frozen, not part of the head), M_ia one linear map per position and
    component, and z the trunk's output. Without trunk ``z = h``.

    * ``cp``: no transitions. Rank 1 is the independent heads of Gloeckle et al. and of Medusa
    * ``markov``: one component, and left and right factors L, R of all contexts and positions;
      gated, ``g_i = 1 + G_i z``, else 1
    * ``markov_mixture``: both
    * ``recurrent``: each position has a state of its own, which has read all drafted tokens before
      it through a small network; over the text, through a transformer layer

    An **anchored** head knows the first token: its trunk reads that token's embedding beside h, and
    it models the n - 1 tokens after it.

    Parameters
    ----------
    hidden_size, vocab_size : int
        Of the base model.
    form : {"cp", "markov", "markov_mixture", "recurrent"}
    horizon : int
    rank, transition_rank : int, optional
        Default: the form's own, see `HeadSizes`.
    gated : bool
        Whether the context gates the transitions.
    over_text : bool
        Of an anchored recurrent head: its step is a transformer layer over the text. Such a head
        is trained and forecast, not decoded with.
    anchored : bool
    width : int, optional
        Of the trunk's residual stream; default: `hidden_size`.
    blocks : int
        Residual blocks (normalise, four times as wide, SiLU, back) of the trunk.
    vocabulary : sequence of int, optional
        The only ids that are drafted; default: all. Others are known and read, never proposed.
    base, base_sha256, tokenizer_sha256 : str
        Whose hidden states the head reads; `attach` refuses any other.

    References
    ----------
    basharin2024faster, gloeckle2024better, cai2024medusa

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> head = DraftHead(hidden_size=8, vocab_size=5, horizon=3, rank=2)
    >>> head = head.attach_weights(torch.randn(5, 8), torch.randn(5, 8))
    >>> head(torch.randn(4, 8)).to_tensor().shape
    torch.Size([4, 5, 5, 5])
    >>> head.draft(torch.randn(4, 8), torch.tensor([0, 1, 2, 3])).horizon
    2
    """

    kept: Tensor
    places: Tensor
    unembedding: Tensor
    embedding: Tensor

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        horizon: int = 4,
        form: str = "cp",
        rank: int | None = None,
        transition_rank: int | None = None,
        gated: bool = True,
        over_text: bool = False,
        anchored: bool = False,
        width: int | None = None,
        blocks: int = 0,
        vocabulary: Sequence[int] | None = None,
        base: str = "",
        base_sha256: str = "",
        tokenizer_sha256: str = "",
    ):
        super().__init__()
        sizes = HeadSizes.of(form, horizon, rank, transition_rank, blocks=blocks)
        self.form, self.horizon, self.rank = form, sizes.horizon, sizes.rank
        self.transition_rank, self.gated, self.over_text = sizes.transition_rank, gated, over_text
        self.hidden_size, self.vocab_size, self.anchored = hidden_size, vocab_size, anchored
        self.base, self.base_sha256, self.tokenizer_sha256 = base, base_sha256, tokenizer_sha256
        self.vocabulary = checked_vocabulary(vocabulary, vocab_size)
        width = hidden_size if width is None else width
        self.plain = form != "recurrent" and not (anchored or blocks or width != hidden_size)
        if not self.plain:
            self.enter = nn.Linear(hidden_size * (2 if anchored else 1), width, bias=False)
            self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
            self.norm = Norm(width)
        self.maps = nn.Parameter(
            torch.randn(self.drafted * self.rank, hidden_size, width) * 0.3 / width**0.5
        )
        self.mixture = nn.Linear(width, self.rank)
        nn.init.zeros_(self.mixture.weight)
        nn.init.zeros_(self.mixture.bias)
        self.mixture.requires_grad_(self.rank > 1)  # the weight of a single component is one
        self._make_memory(width)
        kept = torch.arange(vocab_size) if vocabulary is None else torch.tensor(self.vocabulary)
        places = torch.full((vocab_size,), -1).scatter(0, kept, torch.arange(len(kept)))
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("unembedding", torch.empty(0), persistent=False)
        self.register_buffer("embedding", torch.empty(0), persistent=False)
        self._projected: tuple[tuple, Tensor] | None = None
        self.attached: tuple[tuple, tuple] | None = None  # what the embeddings were made of
        self.ready: tuple[tuple, Any] | None = None  # what decoding makes of it, and of which state

    def __repr__(self) -> str:
        numbers = sum(p.numel() for p in self.parameters())
        sizes = f"rank={self.rank}, transition_rank={self.transition_rank}"
        of = f", of {self.base!r}" if self.base else ""
        return (
            f"{type(self).__name__}({self.form!r}, horizon={self.horizon}, {sizes}, "
            f"anchored={self.anchored}, {numbers:,} numbers{of})"
        )

    def _make_memory(self, width: int) -> None:
        """What reads the tokens drafted before a position: factors, or a step."""
        k = self.transition_rank if self.drafted > 1 else 0
        if k:
            self.left = nn.Parameter(torch.randn(self.vocab_size, k) * _FIRST_LEFT)
            self.right = nn.Parameter(
                torch.zeros(k, len(self.vocabulary or range(self.vocab_size)))
            )
            if self.gated:
                self.gate = nn.Linear(width, (self.drafted - 1) * k)
                nn.init.zeros_(self.gate.weight)
                nn.init.ones_(self.gate.bias)
        if self.over_text and not (self.form == "recurrent" and self.anchored):
            raise ValueError(
                f"a layer over the text in a head of form {self.form!r}, anchored "
                f"{self.anchored}: only anchored recurrent heads have one"
            )
        if self.form == "recurrent":
            step = TextLayer if self.over_text else RecurrentStep
            self.step = step(width, self.hidden_size)

    @property
    def drafted(self) -> int:
        """Positions the head models: all n, or, anchored, the n - 1 after the first."""
        return self.horizon - self.anchored

    @property
    def support_size(self) -> int:
        """Ids that may be drafted."""
        return len(self.kept)

    @property
    def drafted_ids(self) -> Tensor | None:
        """The ids that may be drafted, ascending; None: all."""
        return None if self.vocabulary is None else self.kept

    def support(self, batch_shape: Sequence[int] = ()) -> Support | None:
        """The ids that may be drafted, of every modelled position; None: all."""
        if self.vocabulary is None:
            return None
        own = {"vocab_size": self.vocab_size, "positions": self.drafted}
        return Support.of(self.kept, batch_shape=batch_shape, **own)

    @property
    def has_transitions(self) -> bool:
        """Whether there are left and right factors: not for a single drafted token."""
        return self.transition_rank > 0 and self.drafted > 1

    def forward(
        self, hidden: Float[Tensor, "*batch d"], first_token: Int[Tensor, "*batch"] | None = None
    ) -> CPDistribution | MarkovMixture:
        """The head's own distribution: over x_1 … x_n, or, anchored, over x_2 … x_n given
        `first_token`.

        Raises
        ------
        ValueError
            If the head is recurrent: its distribution has no factors.
        """
        if self.form == "recurrent":
            raise ValueError(
                "a recurrent head has no factors to show: see what it drafts along texts, or its "
                "joint by `head_draft`"
            )
        z = self.trunk(hidden, first_token)
        scores, logits = self.log_weights(z), self.state_logits(hidden, z, self.readout())
        support = self.support(hidden.shape[:-1])
        if self.has_transitions:
            left, right = self.left[None], self.right[None]
            return MarkovMixture(scores.exp(), logits, left, right, self.gates(z), support)
        # factors (*batch, support, rank)
        return CPDistribution(scores.exp(), logits.softmax(-1).mT.unbind(-3), support)

    def draft(
        self, hidden: Float[Tensor, "*batch d"], first_token: Int[Tensor, "*batch"]
    ) -> CPDistribution | MarkovMixture:
        """The law of x_2 … x_n once x_1 is known: read off it (anchored) or by the posterior
        update.

        Parameters
        ----------
        hidden : (*batch, hidden) tensor
            The hidden state that predicted x_1.
        first_token : (*batch,) long tensor
            x_1.
        """
        own = self(hidden, first_token)
        # first token (*batch, 1)
        return own if self.anchored else own.condition(first_token.unsqueeze(-1))

    def trunk(
        self, hidden: Float[Tensor, "*batch d"], first_token: Int[Tensor, "*batch"] | None
    ) -> Float[Tensor, "*batch width"]:
        """z: what maps and mixture weights read; an anchored head puts the token after each hidden
        state into it.
        """
        stream = self.stream(hidden, first_token)
        return stream if self.plain else self.norm(stream)

    def stream(
        self, hidden: Float[Tensor, "*batch d"], first_token: Int[Tensor, "*batch"] | None
    ) -> Float[Tensor, "*batch width"]:
        """Z before it is normalised: what a recurrent head begins with."""
        if self.unembedding.numel() == 0:
            raise ValueError("this head has no base model yet: call head.attach(lm) first")
        if self.plain:
            return hidden
        if self.anchored:
            if first_token is None:
                raise ValueError("an anchored head needs the first token beside the hidden state")
            hidden = torch.cat([hidden, self.embedded(first_token)], -1)  # (*batch, 2 d)
        z = self.enter(hidden)
        for block in self.blocks:
            z = z + block(z)
        return z

    def embedded(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d"]:
        """Normalised embeddings."""
        return functional.rms_norm(self.embedding[tokens], self.embedding.shape[-1:])

    def features(
        self, hidden: Float[Tensor, "rows time d"], tokens: Int[Tensor, "rows longer"]
    ) -> Features:
        """Features of every position along texts, what is drafted there being what comes there.

        Parameters
        ----------
        hidden : (rows, time, hidden) tensor
        tokens : (rows, time + horizon) tensor
            ``hidden[:, t]`` has seen the tokens up to t.
        """
        time = hidden.shape[1]
        paths = tokens[:, 1:].unfold(1, self.horizon, 1)[:, :time]  # (rows, time, horizon)
        before = paths[..., int(self.anchored) : -1]  # (rows, time, drafted - 1)
        stream = self.stream(hidden, paths[..., 0])
        if self.form != "recurrent":
            z = stream if self.plain else self.norm(stream)
            return Features(self.log_weights(z), z, self._left(z, before))
        states = self._states(stream, before)  # (rows, time, drafted, width)
        return Features(self.log_weights(states[..., 0, :]), states)

    def logits(
        self,
        hidden: Float[Tensor, "*batch d"],
        features: Features,
        readout: Tensor,
        right: Tensor | None = None,
    ) -> Float[Tensor, "*batch drafted rank support"]:
        """Logits of every position and component along a path, from `weights` or copies of them."""
        logits = self.state_logits(hidden, features.states, readout)
        if features.left is None or right is None:
            return logits
        moved = functional.linear(features.left, right.mT)  # (*batch, later, support)
        logits[..., 1:, :, :].add_(moved.unsqueeze(-2))
        return logits

    def weights(self) -> tuple[Tensor, ...]:
        """What `logits` multiplies features with: the readout, and right factors if there are."""
        return (self.readout(), self.right) if self.has_transitions else (self.readout(),)

    def state_logits(self, hidden: Tensor, states: Tensor, readout: Tensor) -> Tensor:
        """Logits without transitions, (*batch, drafted, rank, support)."""
        # (*batch, drafted, rank, d or support)
        moved = self._mapped(states, readout).unflatten(-2, (self.drafted, self.rank))
        if self.support_size > self.hidden_size:
            vectors = hidden[..., None, None, :] + moved  # (*batch, drafted, rank, d)
            # As one matrix: of vectors that do not lie in a row torch would copy the unembedding.
            logits = functional.linear(vectors.flatten(0, -2), self.unembedding)
            return logits.unflatten(0, vectors.shape[:-1])
        base = functional.linear(hidden, self.unembedding)  # (*batch, support)
        return moved.add_(base[..., None, None, :])

    def readout(self) -> Tensor:
        """The maps, or what they come to over a support smaller than the hidden state; the latter
        is kept for as long as nothing changes.
        """
        if self.support_size > self.hidden_size:
            return self.maps
        if torch.is_grad_enabled():
            return self.unembedding @ self.maps  # (maps, support, width)
        parts = (self.maps, self.unembedding)
        state = tuple((part.data_ptr(), part._version, part.dtype) for part in parts)
        if self._projected is None or self._projected[0] != state:
            self._projected = (state, self.unembedding @ self.maps)  # (maps, support, width)
        return self._projected[1]

    def gates(self, z: Float[Tensor, "*batch width"]) -> Tensor | None:
        """G of each drafted position but the first, (*batch, later, transition_rank)."""
        if not (self.has_transitions and self.gated):
            return None
        # (*batch, later, transition_rank)
        return self.gate(z).unflatten(-1, (self.drafted - 1, self.transition_rank))

    def _mapped(self, states: Tensor, maps: Tensor) -> Tensor:
        """``maps @ state`` of every map, (*batch, maps, rows of a map)."""
        if self.form != "recurrent":
            return functional.linear(states, maps.flatten(0, 1)).unflatten(-1, maps.shape[:2])
        rows = states.flatten(0, -3).transpose(0, 1)  # (drafted, positions, width)
        return (rows @ maps.mT).transpose(0, 1).unflatten(0, states.shape[:-2])

    def log_weights(self, z: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch rank"]:
        """Of the components."""
        return self.mixture(z).log_softmax(-1)

    def _left(self, z: Tensor, before: Int[Tensor, "*batch later"]) -> Tensor | None:
        if not self.has_transitions:
            return None
        gates, left = self.gates(z), functional.embedding(before, self.left)
        return left if gates is None else left * gates  # (*batch, later, transition_rank)

    def _states(self, stream: Tensor, before: Int[Tensor, "rows time later"]) -> Tensor:
        embedded = self.embedded(before)  # (rows, time, later, d)
        if self.over_text:
            return self.norm(self.step(stream, embedded))
        states = [stream]
        for token in embedded.unbind(-2):
            states.append(self.step(states[-1], token))
        return self.norm(torch.stack(states, -2))  # (rows, time, drafted, width)
