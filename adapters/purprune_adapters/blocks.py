"""A stack of blocks: what each is called with, and calling them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from purprune import ConfigError, SelectionError
from purprune.errors import near_misses


class Call(NamedTuple):
    """What a block gets beside the hidden states, which are its first argument."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    first: str | None
    """The name of the first argument where it is given by name."""

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the hidden states behind the block."""
        if self.first is None:
            return _hidden(block(hidden, *self.args, **self.kwargs))
        return _hidden(block(**{self.first: hidden}, **self.kwargs))


class _LastBlockError(Exception):
    """The last block is reached: what follows is not computed."""


def names_of(model: nn.Module, blocks: str | nn.Module | Sequence[nn.Module]) -> list[str]:
    """Return the names of the blocks in a model.

    Raises:
        SelectionError: there are none, or they are not in the model.
    """
    names = {module: name for name, module in model.named_modules()}
    if isinstance(blocks, str):
        if blocks not in names.values():
            raise SelectionError(
                f"Expected the name of the blocks' ModuleList; got {blocks!r}."
                f"{near_misses(blocks, names.values())}"
            )
        blocks = model.get_submodule(blocks)
    if isinstance(blocks, nn.Module):
        if not isinstance(blocks, nn.ModuleList | nn.Sequential):
            raise SelectionError(
                f"Expected blocks as a ModuleList, a Sequential or a list of modules; got a "
                f"{type(blocks).__name__}. Pass [block] for a single one."
            )
        blocks = list(blocks)
    if strangers := [block for block in blocks if block not in names]:
        raise SelectionError(f"Expected blocks of the model; got another: {strangers[0]}.")
    found = [names[block] for block in blocks]
    if not found or len(set(found)) < len(found):
        raise SelectionError(f"Expected at least one block, and each once; got {found}.")
    return found


def calls_of(stack: Sequence[nn.Module], run: Callable[[], Any]) -> tuple[Tensor, list[Call]]:
    """Run a model up to its last block; return the first block's input, and each one's call.

    Raises:
        ConfigError: a block does not get what the one before it returned.
    """
    calls: list[Call] = []
    states: list[Tensor] = []  # what the first block got, then what each returned

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at = len(calls)
        if at >= len(stack) or module is not stack[at]:
            raise ConfigError(
                f"Expected each block once, in the order in which the model calls them; call "
                f"{at + 1} is of another. Pass the blocks in that order."
            )
        first = None if args else next(iter(kwargs))
        hidden = args[0] if args else kwargs[first or ""]
        if states and hidden is not states[-1] and not torch.equal(hidden, states[-1]):
            raise ConfigError(
                f"Expected blocks in sequence; block {at} does not get first what block {at - 1} "
                f"returned. Leave out the layers between them, or pass one of both as a block."
            )
        rest = {key: value for key, value in kwargs.items() if key != first}
        _refuse_cache(args, rest)
        states[:] = states or [hidden.detach()]
        calls.append(Call(args[1:], rest, first))
        if len(calls) == len(stack):
            raise _LastBlockError

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states[1:] = [_hidden(output)]

    with ExitStack() as hooks:
        for block in stack:
            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(after).remove)
        try:
            run()
        except _LastBlockError:
            return states[0], calls
    raise ConfigError(
        f"Expected batches that run through all {len(stack)} blocks; got as far as {len(calls)}. "
        f"Pass forward= with a call that does."
    )


def _hidden(output: Any) -> Tensor:
    """Return a block's hidden states: what it returns, or the first of it."""
    found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"Expected blocks that return a tensor, or a tuple with one first; got "
            f"{type(found).__name__}."
        )
    return found


def _refuse_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if type(value).__name__.endswith("Cache"):
            raise ConfigError(
                f"Expected calls without a cache, since blocks run more than once; got a "
                f"{type(value).__name__}. Pass use_cache=False to the model."
            )


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Let the models of transformers keep no keys and values, as their configs say by default."""
    configs = {id(config): config for m in model.modules() for config in _caching(m)}
    before = [(config, config.use_cache) for config in configs.values()]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, use in before:
            config.use_cache = use


def _caching(module: nn.Module) -> Iterator[Any]:
    config: Any = getattr(module, "config", None)
    if hasattr(config, "use_cache"):
        yield config
