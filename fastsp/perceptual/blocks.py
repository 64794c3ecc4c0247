"""Blocks that repeat: called by another function for a while, and told apart by all but the values of their weights."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Call = Callable[["Block", tuple[Any, ...], dict[str, Any]], Any]


class Block(nn.Module):
    """Stands where a block of a network was, calls it, and has its attributes: some networks ask their blocks."""

    def __init__(self, block: nn.Module, name: str) -> None:
        super().__init__()
        self.block, self.name = block, name  # in the network
        self.call: Call | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs) if self.call is None else self.call(self, args, kwargs)


def exchange(network: nn.Module, blocks: Sequence[nn.Module]) -> list[Block]:
    """Put a :class:`Block` in the place of each of ``blocks``, in place."""
    names = {module: name for name, module in network.named_modules()}
    exchanged = [Block(block, names[block]) for block in blocks]
    for block in exchanged:
        network.set_submodule(block.name, block)
    return exchanged


@contextmanager
def called_by(call: Call, blocks: Sequence[Block]) -> Iterator[None]:
    """Within it, ``call(block, args, kwargs)`` answers for each of the blocks."""
    for block in blocks:
        block.call = call
    try:
        yield
    finally:
        for block in blocks:
            block.call = None


class BlockFunction(nn.Module):
    """A block as a function that answers with tensors alone; of the last block, with the feature's alone."""

    def __init__(self, block: nn.Module, family: Any) -> None:
        super().__init__()
        self.block, self.family = block, family  # None: it is not the last block
        self.places: list[int] = []  # of the tensors that are answered, among the block's answers
        self.unread: dict[int, Any] = {}  # of those that are not, their shapes without the batch, by place
        self.structure: Any = None

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        output = self.block.forward(*args, **kwargs)
        leaves, self.structure = tree_flatten(output)
        tensors = {place: leaf for place, leaf in enumerate(leaves) if leaf is not None}  # SD3's last has no text
        self.places = list(tensors)
        if self.family is not None and isinstance(output, tuple):
            self.places = [self.family.feature(tuple(range(len(output))), None, {})]
        self.unread = {place: leaf.shape[1:] for place, leaf in tensors.items() if place not in self.places}
        chosen = [leaves[place] for place in self.places]
        return tuple(leaf.clone() if leaf._is_view() else leaf for leaf in chosen)  # AOTAutograd would give the base

    def answer(self, tensors: tuple[Tensor, ...]) -> Any:
        """``tensors`` as the block answers them, with zeros where nobody reads on."""
        rows, nothing = len(tensors[0]), tensors[0].new_zeros(())
        given = dict(zip(self.places, tensors, strict=True))
        given |= {place: nothing.expand(rows, *shape) for place, shape in self.unread.items()}
        leaves = [given.get(place) for place in range(self.structure.num_leaves)]
        return tree_unflatten(leaves, self.structure)


def held(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def structure(module: nn.Module, name: str) -> bytes | int:
    """Equal for modules that compute the same where their parameters and buffers have the same values.

    That is all that they hold, as pickle sees it, but for names that begin with the module's own ``name``: peft's
    layers know theirs. A module that cannot be pickled is equal to itself alone.
    """
    file = io.BytesIO()
    try:
        _Structure(file, module, name).dump(module)
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError):
        return id(module)
    return file.getvalue()


class _Structure(pickle.Pickler):
    """Writes of the tensors that a module holds how they are laid out, and of others which they are."""

    def __init__(self, file: io.BytesIO, module: nn.Module, name: str) -> None:
        super().__init__(file)
        self.prefix = f"{name}."
        self.places = {id(tensor): place for place, tensor in enumerate(held(module).values())}

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(self.prefix):
            return "name", value.removeprefix(self.prefix)
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self.places:
            return id(value)
        layout = type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad
        return self.places[id(value)], str(layout)
