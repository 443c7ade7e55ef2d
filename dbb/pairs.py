"""Which batch norm reads which convolution: found in the graph of the model's forward, not in the order of its layers.

`torch.fx` follows one forward with stand-ins for the tensors and writes down who reads whom. It cannot follow a branch
on a tensor's values or size. Where that happens the module is taken for a black box, and the rest is followed all the
same: around it, and inside each of its children.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from dbb.blocks import BranchBlock
from dbb.fold import is_norm

OUTPUT = "the output"


@dataclass(frozen=True)
class Readers:
    """What reads a convolution's answer: the batch norm by name, or why there is none to take."""

    norm: str | None = None
    reason: str = ""


def find_pairs(model: nn.Module) -> dict[str, Readers]:
    """For every `nn.Conv2d` outside of blocks, by name: the batch norm that reads it, it alone, and nothing else.

    The model is followed in training and in eval mode, on a copy without memory, so that nothing of it changes.
    """
    bare = skeleton(model)
    following = _Following(bare)
    for training in (True, False):
        following.follow(bare.train(training))
    convs = [m for m in outside_of_blocks(bare) if isinstance(m, nn.Conv2d)]
    return {following.names[id(conv)]: following.readers(conv) for conv in convs}


def outside_of_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The module and all that it holds, each once, without what stands inside of blocks."""
    seen: set[int] = set()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if id(module) in seen or isinstance(module, BranchBlock):
            return
        seen.add(id(module))
        yield module
        for child in module.children():
            yield from walk(child)

    return walk(module)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy on the meta device, which takes no memory and has no hooks: arguments and layers, no weights."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, object] = {id(tensor): _like(tensor) for tensor in tensors}
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, OrderedDict):
                memo[id(value)] = OrderedDict()
    return copy.deepcopy(model, memo)


def _like(tensor):
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


class _Tracer(fx.Tracer):
    """Follows a forward down to convolutions, norms, blocks, torch's own layers and the black boxes."""

    def __init__(self, boxes: set[int]) -> None:
        super().__init__()
        self.boxes = boxes

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaf = isinstance(module, (nn.Conv2d, BranchBlock)) or is_norm(module) or id(module) in self.boxes
        return leaf or super().is_leaf_module(module, name)


@dataclass
class _Following:
    """What was seen while following a model: who reads each convolution, and what each norm reads."""

    model: nn.Module
    boxes: dict[int, str] = field(default_factory=dict)  # what could not be followed, and why
    read_by: dict[int, set] = field(default_factory=lambda: defaultdict(set))  # of each conv: ids of norms, or words
    reads: dict[int, set] = field(default_factory=lambda: defaultdict(set))  # of each norm: ids of convs, or words
    touched: set[int] = field(default_factory=set)  # whose weight is read without calling them

    def __post_init__(self) -> None:
        self.names = {id(module): name for name, module in self.model.named_modules()}
        self.modules = {id(module): module for module in self.model.modules()}

    def follow(self, module: nn.Module) -> None:
        """Note what the module's graph shows, and those of all that stands in its black boxes."""
        graph = self._graph(module)
        if graph is None:
            inside = [module]
        else:
            self._note(module, graph)
            inside = [m for m in (_called(module, node) for node in graph.nodes) if id(m) in self.boxes]
        for child in (child for box in inside for child in box.children()):
            convs = any(isinstance(m, nn.Conv2d) for m in child.modules())
            if convs and not isinstance(child, (nn.Conv2d, BranchBlock)):  # which alone say nothing
                self.follow(child)

    def _graph(self, module: nn.Module) -> fx.Graph | None:
        """The graph, with as few black boxes as it takes; None for a module that cannot be followed at all."""
        try:
            return self._traced(module)
        except Exception:  # a forward may fail on stand-ins in any way
            tracer = _Tracer(set(self.boxes))
            for name, child in module.named_children():
                if id(child) not in self.boxes and not tracer.is_leaf_module(child, name):
                    self._graph(child)
        try:
            return self._traced(module)
        except Exception as error:
            self.boxes[id(module)] = f"{type(error).__name__}: {error}".splitlines()[0]
            return None

    def _traced(self, module: nn.Module) -> fx.Graph:
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        return _Tracer(set(self.boxes)).trace(module, concrete_args=defaults or None)

    def _note(self, root: nn.Module, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "get_attr":
                owner = root.get_submodule(node.target.rpartition(".")[0])
                self.touched.add(id(owner))
            module = _called(root, node)
            if isinstance(module, nn.Conv2d):
                self.read_by[id(module)] |= {self._word(root, reader) for reader in _readers(root, node)} or {"nothing"}
            if is_norm(module):
                source = _source(root, node.all_input_nodes[0])
                self.reads[id(module)].add(self._word(root, source))

    def _word(self, root: nn.Module, node: fx.Node) -> int | str:
        """The id of a convolution or batch norm; a word for anything else."""
        module = _called(root, node)
        if isinstance(module, nn.Conv2d) or is_norm(module):
            return id(module)
        if module is not None:
            return type(module).__name__
        return OUTPUT if node.op == "output" else getattr(node.target, "__name__", str(node.target))

    def readers(self, conv: nn.Conv2d) -> Readers:
        """What all graphs together say about a convolution."""
        if id(conv) in self.touched:
            return Readers(reason="its weight is read outside of it")
        found = self.read_by.get(id(conv), set())
        if not found:
            return Readers(reason=self._why_unseen(conv))
        norms = {one for one in found if one in self.modules and is_norm(self.modules[one])}
        if not norms:
            return Readers(reason=f"no batch norm reads it, but {self._spoken(found)}")
        if found != norms or len(norms) > 1:
            return Readers(reason=f"more than one batch norm reads it: {self._spoken(found)}")
        (norm,) = norms
        if self.reads[norm] != {id(conv)}:
            return Readers(reason="its batch norm reads other layers, too")
        return Readers(self.names[norm])

    def _why_unseen(self, conv: nn.Conv2d) -> str:
        for module in reversed(_holders(self.model, conv)):
            if id(module) in self.boxes:
                return (
                    f"{type(module).__name__} cannot be traced ({self.boxes[id(module)]}): "
                    f"name its pairs by hand, pairs={{conv: norm}}"
                )
        return "forward does not call it"

    def _spoken(self, readers: set[int | str]) -> str:
        return ", ".join(sorted(type(self.modules[r]).__name__ if isinstance(r, int) else r for r in readers))


def _called(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(node.target) if node.op == "call_module" else None


def _readers(root: nn.Module, node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a node's answer; an `nn.Identity` in between passes it on."""
    for reader in node.users:
        if type(_called(root, reader)) is nn.Identity:
            yield from _readers(root, reader)
        else:
            yield reader


def _source(root: nn.Module, node: fx.Node) -> fx.Node:
    """Where a node's answer comes from, through what passes it on."""
    while type(_called(root, node)) is nn.Identity:
        node = node.all_input_nodes[0]
    return node


def _holders(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The modules that hold a module, the model first."""
    path = next(name for name, m in model.named_modules() if m is module).split(".")[:-1]
    return [model.get_submodule(".".join(path[:n])) for n in range(len(path) + 1)]
