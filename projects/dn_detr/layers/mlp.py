"""MLP of the prediction heads and feed-forward block of the transformer layers."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """`num_layers` linear layers with ReLU in between: [..., in_dim] -> [..., out_dim]."""

    def __init__(self, *, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(
            nn.Linear(width_in, width_out)
            for width_in, width_out in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """Post-norm feed-forward block: [..., C] -> [..., C] (1706.03762, sec. 3.3)."""

    def __init__(self, *, channels: int, hidden_dim: int, dropout: float, activation: nn.Module):
        super().__init__()
        self.expand = nn.Linear(channels, hidden_dim)
        self.activation = activation
        self.contract = nn.Linear(hidden_dim, channels)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(channels)
        for linear in (self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        update = self.contract(self.dropout(self.activation(self.expand(x))))
        return self.norm(x + self.dropout(update))
