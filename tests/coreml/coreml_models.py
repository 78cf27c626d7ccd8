"""Small pruned models that between them hold every supported kind of weight."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def prune(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    """Zero the smallest entries of every weight, liven up the batch norms, and set eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                count = int(parameter.numel() * sparsity)
                order = parameter.abs().flatten().argsort()
                parameter.view(-1)[order[:count]] = 0
        for module in model.modules():
            if isinstance(module, BATCH_NORMS):
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return model.eval()


def digits_net() -> nn.Module:
    """The network of the demo: conv 70 %, dense 80 %."""
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=2),
        nn.Flatten(),
        nn.Linear(2352, 10),
        nn.LogSoftmax(dim=-1),
    )
    prune(net[0], 0.7)
    prune(net[4], 0.8)
    return net.eval()


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(16, 24, **options)
        self.head = nn.Linear(48 if options.get("bidirectional") else 24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, y, need_weights=False)[0]


class Products(nn.Module):
    """Parameters that are no layer's: x @ w, batched, and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 48) / 6)
        self.v = nn.Parameter(torch.randn(4, 48, 16) / 7)
        self.u = nn.Parameter(torch.randn(16, 8, 6) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bij,bjk->bik", x @ self.w, self.v)
        return torch.einsum("bij,jkl->bikl", x, self.u)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.out = nn.Linear(32, 50, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(x)))


class Residual(nn.Module):
    """Convolutions with folded batch norms, grouped and shared by a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c2, self.b2 = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.BatchNorm2d(16)
        self.skip = nn.Conv2d(8, 16, 1)
        self.up, self.b3 = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b2(self.c2(functional.relu(self.b1(self.c1(x)))))
        return self.b3(self.up(functional.relu(y + self.skip(x))))


def conv1d_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(8, 32, 5, padding=2),
        nn.BatchNorm1d(32),
        nn.SiLU(),
        nn.Conv1d(32, 32, 3, groups=32, dilation=2, padding=2),
        nn.GELU(),
        nn.ConvTranspose1d(32, 16, 4, stride=2, padding=1),
        nn.AvgPool1d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def conv2d_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        nn.Conv2d(32, 32, 3, groups=32, padding=1),
        nn.InstanceNorm2d(32, affine=True),
        nn.LeakyReLU(),
        nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1),
        nn.AvgPool2d(3, 2, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 40),
        nn.Softplus(),
        nn.Linear(40, 10),
    )


def conv3d_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(4, 16, 3, padding=1),
        nn.BatchNorm3d(16),
        nn.ELU(),
        nn.Conv3d(16, 16, 3, groups=4),
        nn.MaxPool3d(2),
        nn.ConvTranspose3d(16, 8, 2, stride=2),
        nn.Sigmoid(),
    )


def upsampling_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.Upsample(scale_factor=2),
        nn.GroupNorm(4, 16),
        nn.PixelShuffle(2),
        nn.Conv2d(4, 20, 3),
    )


def grouped_transposed_net() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2), nn.BatchNorm2d(12))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")


def _r(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(*shape),)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "conv1d": (conv1d_net, lambda: _r(2, 8, 16)),
    "conv2d": (conv2d_net, lambda: _r(2, 8, 16, 16)),
    "conv3d": (conv3d_net, lambda: _r(1, 4, 8, 8, 8)),
    "residual": (Residual, lambda: _r(2, 8, 12, 12)),
    "grouped transposed": (grouped_transposed_net, lambda: _r(1, 8, 5, 5)),
    "upsampling": (upsampling_net, lambda: _r(1, 4, 8, 8)),
    "lstm": (
        lambda: Recurrent("LSTM", batch_first=True, bidirectional=True, num_layers=2),
        lambda: _r(2, 5, 16),
    ),
    "lstm at the top": (lambda: nn.LSTM(16, 24), lambda: _r(5, 2, 16)),
    "gru": (lambda: Recurrent("GRU", bidirectional=True), lambda: _r(5, 2, 16)),
    "rnn": (lambda: Recurrent("RNN"), lambda: _r(5, 2, 16)),
    "bidirectional rnn": (lambda: Recurrent("RNN", bidirectional=True), lambda: _r(3, 2, 16)),
    "attention": (Attention, lambda: (torch.randn(2, 5, 32), torch.randn(2, 7, 32))),
    "encoder": (encoder, lambda: _r(2, 5, 32)),
    "products": (Products, lambda: _r(4, 5, 32)),
    "tied": (Tied, lambda: (torch.randint(0, 50, (3, 7)),)),
}


def build(name: str, sparsity: float = 0.8) -> tuple[nn.Module, tuple[Tensor, ...]]:
    make, inputs = MODELS[name]
    return prune(make(), sparsity), inputs()
