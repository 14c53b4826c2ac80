"""The parts of a head that learn what to read: residual blocks, and the steps that read drafts."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

_CHANNELS = 32  # of each of a layer's attention heads


class Norm(nn.RMSNorm):
    """Root mean square one, times a weight, in the weight's precision whatever comes in."""

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Normalised over the last axis."""
        return super().forward(x.to(self.weight.dtype))


class ResidualBlock(nn.Module):
    """Normalise, widen by four, SiLU, back; zero at the start of training."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = Norm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, z: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What the block adds to `z`."""
        return self.down(functional.silu(self.up(self.norm(z))))


class RecurrentStep(nn.Module):
    """One drafted token more: the state reads its embedding through a small network.

    ``s' = s + W_down silu(W_up [norm(s), e])``; zero at the start of training.
    """

    def __init__(self, width: int, embedded: int):
        super().__init__()
        self.norm = Norm(width)
        self.up = nn.Linear(width + embedded, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(
        self, state: Float[Tensor, "*batch width"], embedded: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch width"]:
        """The state after one more token."""
        read = torch.cat([self.norm(state), embedded], -1)  # (*batch, width + d)
        return state + self.down(functional.silu(self.up(read)))


class TextLayer(nn.Module):
    """A transformer layer that runs over the text and, step by step, over what is drafted after
    each of its positions.

    Step 0 of position t attends to the stream of the text up to t. Step j reads the state that step
    j - 1 left and the token drafted since, and attends to the same stream and to the steps before
    it, at rotary positions t + 1 … t + j: one layer for all steps, as in EAGLE.

    References
    ----------
    li2024eagle
    """

    def __init__(self, width: int, embedded: int):
        super().__init__()
        if width % _CHANNELS:
            raise ValueError(
                f"width {width} of a head with a layer over the text: expected a multiple of "
                f"{_CHANNELS}"
            )
        self.fuse = nn.Linear(width + embedded, width, bias=False)
        self.norm = Norm(width)
        self.attend = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.block = ResidualBlock(width)
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        stream: Float[Tensor, "rows time width"],
        drafted: Float[Tensor, "rows time steps d"],
    ) -> Float[Tensor, "rows time states width"]:
        """States of all steps at all positions, one more than `drafted` has embeddings of tokens.

        Parameters
        ----------
        stream : (rows, time, width) tensor
        drafted : (rows, time, steps, d) tensor
            Embeddings of the tokens read after step 0.
        """
        time = torch.arange(stream.shape[1], device=stream.device)
        query, text_key, text_value = self._parts(stream, time)
        mixed = functional.scaled_dot_product_attention(  # (rows, heads, time, channels)
            query, text_key, text_value, is_causal=True
        )
        states = [self._after(stream, mixed)]
        keys, values = [], []

        hidden = text_key.new_full((len(time), len(time)), -torch.inf).triu(1)  # (time, time)
        for step, embedded in enumerate(drafted.unbind(2)):
            entered = self.fuse(torch.cat([states[-1], embedded], -1))  # (rows, time, width)
            query, key, value = self._parts(entered, time + step + 1)
            keys.append(key)
            values.append(value)

            scale = query.shape[-1] ** -0.5
            of_text = query @ text_key.mT * scale + hidden  # (rows, heads, time, time)
            own = torch.stack([(query * k).sum(-1) for k in keys], -1) * scale  # (…, time, step)
            share = torch.cat([of_text, own], -1).softmax(-1)
            of_text, own = share.split([len(time), len(keys)], -1)
            # (rows, heads, time, channels)
            mixed = of_text @ text_value + (own.unsqueeze(-1) * torch.stack(values, 3)).sum(3)
            states.append(self._after(entered, mixed))
        return torch.stack(states, 2)

    def _parts(self, entered: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (rows, heads, time, channels) each."""
        read = self.attend(self.norm(entered))  # (rows, time, 3 width)
        # (3, rows, heads, time, channels)
        parts = read.unflatten(-1, (3, -1, _CHANNELS)).permute(2, 0, 3, 1, 4)
        return _rotated(parts[0], positions), _rotated(parts[1], positions), parts[2]

    def _after(self, entered: Tensor, mixed: Tensor) -> Tensor:
        """The layer's second half, (rows, time, width)."""
        state = entered + self.out(mixed.transpose(1, 2).flatten(2))  # (rows, time, width)
        return state + self.block(state)


def _rotated(x: Float[Tensor, "rows heads time channels"], at: Int[Tensor, " time"]) -> Tensor:
    """Rotary positions: halves of the channels as real and imaginary parts."""
    half = x.shape[-1] // 2
    speed = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = at[:, None] * speed  # (time, half)
    real, imaginary = x.split(half, -1)
    cos, sin = angle.cos(), angle.sin()
    # (…, time, channels)
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
