"""The linear layers of a Llama-3.1-8B block, and what of its MLP lies between them."""

from torch import Tensor, nn

WIDE, INNER, KEYS = 4096, 14336, 1024
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Attention(nn.Module):
    """The four projections, without what lies between."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(WIDE, WIDE, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(WIDE, KEYS, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        k, v = (projection(x).repeat(1, 1, WIDE // KEYS) for projection in (self.k_proj, self.v_proj))
        return self.o_proj(self.q_proj(x) + k + v)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDE, INNER, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(INNER, WIDE, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.self_attn(x))
