"""Train a small byte-level GPT on text that every Python has, then prune it in one shot.

The text is what ``help()`` says of the language (``pydoc_data.topics``, about 460 KB of English);
every tenth topic is held out. Then the blocks are pruned one after the other on calibration data
that the model was trained on, by four methods and to four patterns, and nothing is trained again:

    python examples/language_model.py               # two minutes on one busy core
    python examples/language_model.py --steps 100   # less

Magnitude and SparseGPT have one count for each layer, Wanda and RIA one for each output, as in
their papers; 2:4 is the same for all.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from purprune import NM, Rule, Unstructured
from purprune.tables import text_table
from purprune_adapters import prune_layerwise

CONTEXT = 64
PATTERNS = ("50 %", "60 %", "70 %", "2:4")
METHODS = ("magnitude", "wanda", "ria", "sparsegpt")


class Block(nn.Module):
    """Causal self-attention, then a feed-forward network, each beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        """Make the layers."""
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.between = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Take and return hidden states, (batch, positions, width)."""
        parts = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        added: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return added


class GPT(nn.Module):
    """Predicts the next byte from embeddings of each byte and of the three before it.

    A short training learns little of where to look; this gives it the neighbours from the start.
    """

    def __init__(self, width: int, depth: int, heads: int = 4) -> None:
        """Make the layers."""
        super().__init__()
        self.bytes = nn.ModuleList(nn.Embedding(256, width) for _ in range(4))
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Return logits, (batch, positions, 256)."""
        length = text.shape[1]
        x = self.places.weight[:length].expand(len(text), -1, -1)
        for back, embedding in enumerate(self.bytes):
            x = x + embedding(F.pad(text, (back, 0))[:, :length])
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def corpus() -> tuple[Tensor, Tensor]:
    """Return the bytes to train on and those that are held out."""
    texts = [text for _, text in sorted(topics.items())]
    held_out = "\n".join(texts[::10])
    rest = "\n".join(text for i, text in enumerate(texts) if i % 10)
    first, second = (torch.tensor([*text.encode()]) for text in (rest, held_out))
    return first, second


def sample(text: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return pieces of the text from random places, each of one byte more than the context."""
    starts = torch.randint(len(text) - CONTEXT, (size, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)]


def loss(model: nn.Module, pieces: Tensor) -> Tensor:
    """Return the mean cross entropy of each next byte, in nats."""
    logits = model(pieces[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())


def train(model: nn.Module, text: Tensor, steps: int, batch: int) -> None:
    """Train with AdamW, and a rate that rises and falls once."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, sample(text, batch, generator)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor) -> float:
    """Return the mean bits that the model needs for a byte of the text."""
    model.eval()
    pieces = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    losses = [float(loss(model, part)) * len(part) for part in torch.split(pieces, 64)]
    return sum(losses) / len(pieces) / math.log(2)


def rule_for(method: str, pattern: str) -> Rule:
    """Return the rule that prunes to a pattern as the method's paper does."""
    if pattern == "2:4":
        return Rule(pattern=NM(zeros=2, m=4))
    sparsity = int(pattern.split()[0]) / 100
    in_rows = method in ("wanda", "ria")
    return Rule(sparsity, pattern=Unstructured(scope="row" if in_rows else "tensor"))


def compare(
    model: GPT, calibration: Sequence[Tensor], held_out: Tensor, patterns: Sequence[str]
) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the mean error of the layers and the bits per byte, by method and pattern."""
    found = {}
    for pattern in patterns:
        for method in METHODS:
            pruned, _, report = prune_layerwise(
                model, model.blocks, calibration, rule_for(method, pattern), method=method
            )
            found[method, pattern] = (report.error, bits_per_byte(pruned, held_out))
    return found


def table(found: Mapping[tuple[str, str], tuple[float, float]], patterns: Sequence[str]) -> str:
    """Return a line for each method, and for each pattern the error and the bits per byte."""
    head = ["method", *(f"{pattern} {what}" for pattern in patterns for what in ("error", "bits"))]
    rows = [
        [method, *(f"{n:.3f}" for pattern in patterns for n in found[method, pattern])]
        for method in METHODS
    ]
    return text_table(head, rows)


def main(arguments: Sequence[str] | None = None) -> dict[tuple[str, str], tuple[float, float]]:
    """Train, prune, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=400, help="steps of the training")
    parser.add_argument("--batch", type=int, default=16, help="pieces in a batch of the training")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--calibrate", type=int, default=256, help="pieces to calibrate on")
    parser.add_argument("--evaluate", type=int, help="bytes to evaluate on; all by default")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    training, held_out = corpus()
    held_out = held_out[: options.evaluate]
    print(f"{len(training):,} bytes to train on, {len(held_out):,} held out")
    model, start = GPT(options.width, options.depth), time.perf_counter()
    train(model, training, options.steps, options.batch)
    seconds = time.perf_counter() - start
    dense = bits_per_byte(model, held_out)
    print(f"{options.steps} steps in {seconds:.0f} s: {dense:.3f} bits per byte held out")
    calibration = sample(training, options.calibrate, torch.Generator().manual_seed(1))[:, :-1]
    found = compare(model, torch.split(calibration, 32), held_out, options.patterns)
    print(table(found, options.patterns))
    return found


if __name__ == "__main__":
    main()
