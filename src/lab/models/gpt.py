"""GPT-2 (Radford et al. 2019), as in nanoGPT (Karpathy 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lab.models import freezing
from regrow.errors import UserError

DEVIATION = 0.02  # of initial weights


class GPT(nn.Module):
    """Maps tokens (B, T), T up to the context, to logits (B, T, num_outputs) of the next token.

    The token embedding is also the output layer. Initial weights are normal, and those that end a
    residual branch are divided by the root of the number of branches; biases start at zero.
    """

    def __init__(
        self,
        *,
        input_shape: list[int],
        num_outputs: int,
        layers: int,
        heads: int,
        width: int,
        dropout: float,
        bias: bool,
        freeze: list[str],
    ) -> None:
        super().__init__()
        if len(input_shape) != 1:
            raise UserError(
                f"data.input_shape={list(input_shape)}: this model needs tokens, [context]. Use "
                "data=text, or another model."
            )
        if width % heads:
            raise UserError(
                f"model.heads={heads} does not divide model.width={width}. Choose a divisor."
            )
        self.token_embedding = nn.Embedding(num_outputs, width)
        self.position_embedding = nn.Embedding(input_shape[0], width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=bias)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                shrinks = name.endswith("project.weight")
                nn.init.normal_(parameter, std=DEVIATION / (2 * layers if shrinks else 1) ** 0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        freezing.freeze(self, freeze)

    def forward(self, inputs: Tensor) -> Tensor:
        positions = self.position_embedding.weight[: inputs.shape[1]]
        x = self.dropout(self.token_embedding(inputs) + positions)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token_embedding.weight)


class Block(nn.Module):
    """Attention and an MLP, each applied to normalised values and added: (B, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, bias=bias) for _ in range(2))
        self.attention = Attention(width, heads, dropout, bias)
        self.mlp = FeedForward(width, dropout, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        x = x + self.mlp(self.norm_2(x))
        return x


class Attention(nn.Module):
    """Causal self-attention; torch chooses the kernel, such as FlashAttention on a GPU."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.query_key_value = nn.Linear(width, 3 * width, bias=bias)
        self.project = nn.Linear(width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.query_key_value(x).chunk(3, -1)
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in parts
        )  # each (B, heads, T, width / heads)
        rate = self.rate if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        x = x.transpose(1, 2).reshape(batch, length, width)
        projected: Tensor = self.dropout(self.project(x))
        return projected


class FeedForward(nn.Module):
    def __init__(self, width: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width, bias=bias)
        self.project = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.dropout(self.project(F.gelu(self.expand(x))))
        return projected
