"""The run time of a GeGLU variant: it builds the converted blocks when a checkpoint is loaded.

This file travels with every checkpoint that needs it (``trust_remote_code=True`` runs it) and is also what the plugin
uses, so it imports torch and transformers and nothing else.

How a variant is put together:

* Its config is a subclass of the base's, ``model_type = "geglu_" + base``, with a ``geglu`` entry that lists the sites.
* Its classes are subclasses of the base's, made on demand: ``GegluBertForMaskedLM(GegluMixin, BertForMaskedLM)``.
* A dense block keeps its modules, names and ``forward``. The up projection becomes twice as wide, rows packed as
  [gate | value], and the activation becomes a `PackedGLU` that splits them: ``activation(gate) * value``
  (Shazeer 2020, arXiv:2002.05202, eq. 6, with biases).
* A gated block keeps its projections; only its activation is another one.

Shapes: D hidden size, F intermediate size; a packed projection is D -> 2F.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import importlib
import inspect
import json
import os
import re
import shutil
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

SCHEMA = 1
"""Version of ``config.geglu``. A reader refuses a newer one instead of guessing."""

MODEL_TYPE_PREFIX = "geglu_"
CLASS_PREFIX = "Geglu"
TRIPWIRE = (
    "geglu: this checkpoint is a GeGLU variant, which the plain class cannot run; load it with the AutoModel classes "
    "after `import hf_geglu` (pip install hf_geglu), or with trust_remote_code=True"
)
"""What the config states as its activation. Every class looks that name up in ACT2FN, so one that knows nothing of
variants stops here, with this sentence in the error, instead of running the wrong network. Where no entry names the
activation, one that the class cannot do without states it, in the saved file only (``geglu["saved"]``)."""


class VariantLoadError(ValueError):
    """A variant that cannot be built from its config: newer schema, or sites that this class does not have."""


def activation_named(name: str) -> Any:
    """A new activation from transformers' ``ACT2FN``; imported here because transformers 5 brings a second's worth of
    other modules along."""
    from transformers.activations import ACT2FN

    return ACT2FN[name]


class PackedGLU(nn.Module):
    """The gated unit on a packed projection: ``activation(gate) * (value + offset)`` with ``[gate | value]`` in one
    dimension.

    The gate comes first, as in the formulas of Shazeer 2020 (arXiv:2002.05202, eq. 5 and 6: ``GELU(xW) * xV``).
    `torch.nn.functional.glu` puts it last: ``glu(cat([value, gate])) == value * sigmoid(gate)``.

    Args:
        activation: what the gate goes through: a module, a function, or a name in transformers' ``ACT2FN``.
        dim: the packed dimension: the last one, or that of the channels between convolutions.
        groups: of the grouped convolution whose answer is packed: each group has a gate and a value of its own.
        offset: added to the value, where the projection has no bias to keep a constant in.

    Shapes: (..., 2F, ...) -> (..., F, ...). Raises ValueError where that dimension is odd.
    """

    def __init__(
        self,
        activation: str | Callable[[torch.Tensor], torch.Tensor],
        *,
        dim: int = -1,
        groups: int = 1,
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation_named(activation) if isinstance(activation, str) else activation
        self.dim, self.groups, self.offset = dim, groups, offset

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        """Split into halves and multiply."""
        if packed.shape[self.dim] % 2:
            raise ValueError(
                f"a packed GLU halves dimension {self.dim}, but it has {packed.shape[self.dim]} elements; expected "
                "[gate | value], two halves of equal width"
            )
        if self.groups > 1:
            dim = self.dim % packed.ndim
            halves = torch.unflatten(packed, dim, (self.groups, 2, -1)).unbind(dim + 1)
            gate, value = (half.flatten(dim, dim + 1) for half in halves)
        else:
            gate, value = packed.chunk(2, dim=self.dim)
        if gate.device.type == "cpu":
            # there float32 GELU is oneDNN's where memory is contiguous and ATen's where it is not, 5e-7 apart: without
            # the copy an exact conversion would differ from its original
            gate = gate.contiguous()
        activated: torch.Tensor = self.activation(gate)
        return activated * (value + self.offset if self.offset else value)

    def extra_repr(self) -> str:
        """Only what is not as usual."""
        shown = {"dim": (self.dim, -1), "groups": (self.groups, 1), "offset": (self.offset, 0.0)}
        return ", ".join(f"{name}={value}" for name, (value, usual) in shown.items() if value != usual)


class ScaledActivation(nn.Module):
    """``beta activation(a z)``, for blocks that clamp what goes into the activation: there a scaling cannot be folded
    into the weights."""

    def __init__(self, activation: str | Callable[[torch.Tensor], torch.Tensor], a: float, beta: float) -> None:
        super().__init__()
        self.activation = activation_named(activation) if isinstance(activation, str) else activation
        self.a, self.beta = a, beta

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        activated: torch.Tensor = self.activation(self.a * z)
        return self.beta * activated

    def extra_repr(self) -> str:
        """The two constants."""
        return f"a={self.a:g}, beta={self.beta:g}"


WIDTH_NAMES = ("out_features", "nf", "out_channels")
"""What nn.Linear, transformers' Conv1D and convolutions call the number of their outputs."""


def widen(up: nn.Module, width: int) -> nn.Module:
    """The packed form of an up projection: same class and attributes, twice `width` outputs, always with a bias.

    Works for ``nn.Linear`` and convolutions (weight (out, in, ...)), transformers' ``Conv1D`` (weight (in, out)) and
    their subclasses. The new parameters are empty: the caller fills them. The bias is where an exact conversion keeps
    its constant value branch.
    """
    weight = up.weight
    assert isinstance(weight, torch.Tensor)
    name = next(name for name in WIDTH_NAMES if hasattr(up, name))
    outputs = 1 if name == "nf" else 0
    shape = [2 * width if dim == outputs else size for dim, size in enumerate(weight.shape)]
    packed = copy.copy(up)
    for registry in ("_parameters", "_buffers", "_modules"):
        setattr(packed, registry, dict(getattr(up, registry)))
    packed.weight = nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))
    packed.bias = nn.Parameter(torch.empty(2 * width, dtype=weight.dtype, device=weight.device))
    setattr(packed, name, 2 * width)
    return packed


def _widen_stack(model: nn.Module, path: str, dim: int) -> None:
    """The same for a parameter that holds the matrices of all experts, with their outputs in `dim`, and its bias if it
    has one (where `expand` put it)."""
    for full, outputs in ((path, dim), (stack_bias(path), -1)):
        owner, _, name = full.rpartition(".")
        held = model.get_submodule(owner)._parameters
        old = held.get(name)
        if old is not None:
            shape = list(old.shape)
            shape[outputs] *= 2
            held[name] = nn.Parameter(old.new_empty(shape))


def stack_bias(path: str) -> str:
    """Name of the bias of the experts whose matrices lie in the parameter at `path`: beside it, ``gate_up_proj_bias``,
    ``fc1.bias``. It need not be there."""
    owner, _, name = path.rpartition(".")
    own = "bias" if name == "weight" else f"{name}_bias"
    return f"{owner}.{own}" if owner else own


def set_attribute(root: nn.Module, path: str, value: Any) -> None:
    """Put `value` at a dotted path, whether a module, a function or nothing was there (nn.Module keeps them apart)."""
    parent_path, _, name = path.rpartition(".")
    parent = root.get_submodule(parent_path)
    if isinstance(value, nn.Module) != (name in parent._modules) and hasattr(parent, name):
        delattr(parent, name)  # between the same kinds, plain assignment keeps the order of the modules
    setattr(parent, name, value)


def get_attribute(root: nn.Module, path: str) -> Any:
    """What a dotted path holds: a module, a function, or any other attribute."""
    parent_path, _, name = path.rpartition(".")
    return getattr(root.get_submodule(parent_path), name)


EXPOSED = "gate_activation"
"""The attribute that an exposed activation is called through."""


def activation_calls(kind: type[nn.Module]) -> list[str]:
    """What a class's `forward` computes of one expression, and so might be an activation that no attribute holds:
    ``"F.silu(_)"``, ``"torch.square(torch.relu(_))"``, ``"_ * torch.sigmoid(self.alpha * _)"``; the second of a kind
    with a number, ``"F.relu(_) #1"``; in another method with its name, ``"feed_forward: F.relu(_)"``."""
    found: dict[str, None] = {}
    for method in ("forward", *(name for name in vars(kind) if not name.startswith("__") and name != "forward")):
        try:
            function, tree = _parsed(kind, method)
        except (OSError, TypeError, SyntaxError):  # no source, or none that stands alone
            continue
        counts: dict[str, int] = {}
        for node in ast.walk(tree):
            for pattern, _ in _readings(node):
                if _names(ast.parse(pattern)) - {"_", "self"} <= function.__globals__.keys():
                    counts[pattern] = number = counts.get(pattern, -1) + 1
                    prefix = "" if method == "forward" else f"{method}: "
                    found[f"{prefix}{pattern}{f' #{number}' if number else ''}"] = None
    return list(found)


def expose_activation(module: nn.Module, call: str) -> None:
    """Make `module` call one of its `activation_calls` through an attribute of its own, `EXPOSED`, which holds it.

    The instance gets a subclass of its class whose method is the same source with that one expression replaced; nothing
    is computed otherwise.

    Raises:
        VariantLoadError: this version of the class has no such call.
    """
    method, pattern, _ = _parts(call)
    scope = inspect.unwrap(getattr(type(module), method, type(module).forward)).__globals__
    module.__class__ = _exposed_class(type(module), call)  # type: ignore[arg-type]
    name = pattern.removesuffix("(_)")
    if name != pattern and "(" not in name and not name.startswith("self."):
        held = eval(name, scope)  # an expression of that very class, as below
    else:
        held = eval(f"lambda self: lambda _: {pattern}", scope)(module)
    setattr(module, EXPOSED, held)


def _parts(call: str) -> tuple[str, str, int]:
    """Method, expression and number of a call."""
    head, separator, tail = call.partition(": ")
    method, rest = (head, tail) if separator and head.isidentifier() else ("forward", call)
    pattern, _, number = rest.partition(" #")
    return method, pattern, int(number or 0)


@functools.cache
def _exposed_class(kind: type[nn.Module], call: str) -> type[nn.Module]:
    method, pattern, number = _parts(call)
    try:
        function, tree = _parsed(kind, method)
        readings = ((node, inner, text) for node in ast.walk(tree) for text, inner in _readings(node))
        node, inner = [(node, inner) for node, inner, text in readings if text == pattern][number]
    except (AttributeError, IndexError, OSError, TypeError) as error:
        raise VariantLoadError(
            f"{kind.__name__} does not call {call!r}, as the config of this GeGLU variant says; load it with the "
            "transformers version in its config (`transformers_version`), or convert the base model again with this one"
        ) from error
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    owner = ast.Name(definition.args.args[0].arg, ast.Load())
    tree = _Put(node, ast.Call(ast.Attribute(owner, EXPOSED, ast.Load()), [inner], [])).visit(tree)
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(ast.fix_missing_locations(tree), f"<{kind.__qualname__}.{method}>", "exec", flags, dont_inherit=True)
    namespace: dict[str, Any] = {}
    exec(code, function.__globals__, namespace)
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, method: namespace[definition.name]})


def _parsed(kind: type[nn.Module], method: str) -> tuple[Any, ast.Module]:
    """A method's function and its syntax tree. TypeError where the source would mean something else outside its
    class."""
    function = inspect.unwrap(getattr(kind, method))
    if not inspect.isfunction(function) or function.__code__.co_freevars or not function.__code__.co_argcount:
        raise TypeError(f"{kind.__name__}.{method} is no plain method")
    return function, ast.parse(textwrap.dedent(inspect.getsource(function)))


def _readings(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """An expression as a function of one inside it, as source with that one written as "_".

    A call is one of its first argument, or of the object of a method, and of what those are computed of in turn;
    arithmetic is one of the only variable in it.
    """
    hole = ast.Name("_", ast.Load())
    if isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], ast.Starred):
        outer, inner = ast.Call(node.func, [hole, *node.args[1:]], node.keywords), node.args[0]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        outer = ast.Call(ast.Attribute(hole, node.func.attr, ast.Load()), [], node.keywords)
        inner = node.func.value
    elif isinstance(node, ast.BinOp):
        stored = _names(node) - {"self", "torch", "math"}
        if len(stored) == 1:
            name = stored.pop()
            text = ast.unparse(_Put(name, hole).visit(ast.parse(ast.unparse(node), mode="eval")))
            yield text, ast.Name(name, ast.Load())
        return
    else:
        return
    text = ast.unparse(outer)
    yield text, inner
    for deeper, innermost in _readings(inner) if isinstance(inner, ast.Call) else ():
        yield ast.unparse(_Put("_", ast.parse(deeper, mode="eval").body).visit(ast.parse(text, mode="eval"))), innermost


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


class _Put(ast.NodeTransformer):
    """Puts an expression in the place of a node, or of every variable of a name."""

    def __init__(self, place: ast.AST | str, new: ast.expr) -> None:
        self.place, self.new = place, new

    def visit(self, node: ast.AST) -> Any:
        """As in `ast.NodeTransformer`."""
        named = isinstance(node, ast.Name) and node.id == self.place
        return self.new if named or node is self.place else self.generic_visit(node)


def _locate(model: nn.Module, path: str, call: str | None) -> str | None:
    """Where a site's path is in this class: a head keeps the base model under ``base_model_prefix``, the base does
    not. An activation still to be exposed is where its module is."""
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")):
        owner, _, name = candidate.rpartition(".")
        try:
            model.get_submodule(owner) if call and name == EXPOSED else get_attribute(model, candidate)
        except AttributeError:
            continue
        return candidate
    return None


def renamed(model: nn.Module, name: str, *, backwards: bool = False) -> str:
    """A tensor's name in a checkpoint as this class has it, or backwards; the same where transformers (before 5) keeps
    no such list."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return name
    renamings = [
        each for each in get_model_conversion_mapping(model, add_legacy=False) if isinstance(each, WeightRenaming)
    ]
    for each in reversed(renamings) if backwards else renamings:
        name = (each.reverse_transform() if backwards else each).rename_source_key(name)[0]
    return name


def _moved(model: nn.Module, site: dict[str, Any]) -> dict[str, str] | None:
    """Where another version of transformers than the one that wrote the config has a dense site: its up projection is
    where its tensors go, and its activation is the only one beside it."""
    if site["up"] is None or "call" in site or "stack" in site:
        return None
    names = (renamed(model, f"{site['up']}.weight").removesuffix(".weight"), site.get("saved"))
    for up in (_locate(model, name, None) for name in names if name):
        beside = {} if up is None else dict(model.get_submodule(up.rpartition(".")[0]).named_children())
        found = [name for name, child in beside.items() if isinstance(child, _activations())]
        if up is not None and len(found) == 1:
            return {"up": up, "activation": f"{up.rpartition('.')[0]}.{found[0]}"}
    return None


@functools.cache
def _activations() -> tuple[type, ...]:
    names = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu")
    return (PackedGLU, *(type(activation_named(name)) for name in names))


def located_sites(model: nn.Module, sites: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The sites with their paths as this class has them.

    A class may hold one tower of an encoder-decoder (T5EncoderModel): the sites of the other are then absent as a
    whole. Anything else that is absent is an error.
    """
    prefix = getattr(model, "base_model_prefix", "")
    found: list[dict[str, Any]] = []
    present: set[str] = set()
    absent: dict[str, str] = {}
    for site in sites:
        paths = {key: _locate(model, site[key], site.get("call")) for key in ("up", "activation") if site.get(key)}
        if None in paths.values():
            paths.update(_moved(model, site) or {})
        tower = site["activation"].removeprefix(f"{prefix}.").split(".")[0]
        missing = [site[key] for key, path in paths.items() if path is None]
        if missing:
            absent[tower] = missing[0]
        else:
            present.add(tower)
            found.append({**site, **paths})
    for tower, path in absent.items():
        if tower in present or not present:
            import transformers

            raise VariantLoadError(
                f"the config of this GeGLU variant names the site {path!r}, but {type(model).__name__} of transformers "
                f"{transformers.__version__} has no such module; load it with the transformers version in its config "
                "(`transformers_version`), or convert the base model again with this one"
            )
    return iter(found)


def build_variant_blocks(model: nn.Module, geglu: Mapping[str, Any]) -> None:
    """Turn the freshly built blocks of `model` into those that ``config.geglu`` lists; weights come from the
    checkpoint."""
    for site in located_sites(model, list(geglu["sites"])):
        if "call" in site:
            expose_activation(model.get_submodule(site["activation"].rpartition(".")[0]), site["call"])
        activation = (
            get_attribute(model, site["activation"]) if site["gate"] is None else activation_named(site["gate"])
        )
        if site["up"] is not None:
            if "stack" in site:
                _widen_stack(model, site["up"], site["stack"])
                _initialise(model, model.get_submodule(site["up"].rpartition(".")[0]))
            else:
                packed = widen(model.get_submodule(site["up"]), site["width"])
                _initialise(model, packed)
                set_attribute(model, site["up"], packed)
            activation = PackedGLU(activation, **{key: site[key] for key in ("dim", "groups", "offset") if key in site})
        elif "scale" in site:
            activation = ScaledActivation(activation, *site["scale"])
        set_attribute(model, site["activation"], activation)


def _initialise(model: nn.Module, packed: nn.Module) -> None:
    """Values for an untrained model; those of a checkpoint replace them, and on the meta device there is nothing to
    do."""
    with torch.no_grad():
        for name, parameter in packed.named_parameters(recurse=False):
            if parameter.device.type != "meta":
                nn.init.zeros_(parameter) if name == "bias" else nn.init.normal_(parameter, std=_init_std(model))
        if all(parameter.device.type != "meta" for parameter in packed.parameters(recurse=False)):
            model._init_weights(packed)  # type: ignore[operator]


def _init_std(model: nn.Module) -> float:
    """Standard deviation for classes whose `_init_weights` does not know the projection: the config's, else 0.02
    (BERT)."""
    return float(getattr(model.config, "initializer_range", None) or 0.02)


def config_entry(config: Any, key: str) -> Any:
    """An entry of a config or of a nested one: "hidden_act", "text_config.hidden_act"."""
    return functools.reduce(getattr, key.split("."), config)


def set_config_entry(config: Any, key: str, value: Any) -> None:
    """Set what `config_entry` reads, past the checks of config classes that allow certain activations only."""
    *parents, name = key.split(".")
    vars(functools.reduce(getattr, parents, config))[name] = value


@contextmanager
def base_activation(config: Any) -> Iterator[None]:
    """While a base class builds itself, its config states the activation it was made with, not the tripwire."""
    original = (getattr(config, "geglu", None) or {}).get("config", {})
    tripwires = {key: config_entry(config, key) for key in original}
    try:
        for key, value in original.items():
            set_config_entry(config, key, value)
        yield
    finally:
        for key, value in tripwires.items():
            set_config_entry(config, key, value)


@contextmanager
def _of_the_base(config: Any) -> Iterator[type]:
    """While a base class builds itself, its config is of the base's class. A head that makes its body by
    ``AutoModel.from_config(config)`` gets the base's then, whose blocks are converted once, with all the others; it is
    not asked to trust remote code again."""
    variant = type(config)
    if not str(variant.model_type).startswith(MODEL_TYPE_PREFIX):
        yield variant
        return
    auto_map = vars(config).pop("auto_map", None)
    config.__class__ = variant.__mro__[1]
    try:
        yield variant.__mro__[1]
    finally:
        config.__class__ = variant
        if auto_map is not None:
            vars(config)["auto_map"] = auto_map


def _swap(entries: dict[str, Any], path: list[str], value: Any) -> Any:
    """Put `value` at a path of nested dictionaries, on copies of those below the first; returns what was there."""
    name, *rest = path
    if not rest:
        old, entries[name] = entries.get(name), value
        return old
    nested = entries.get(name)
    entries[name] = nested = dict(nested) if isinstance(nested, Mapping) else nested.to_dict()  # type: ignore[union-attr]
    return _swap(nested, rest, value)


def _wildcard(path: str) -> str:
    """As tensor-parallel plans name a repeated module: "layers.3.mlp.fc1" -> "layers.*.mlp.fc1"."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def gather_packed(model: nn.Module, ups: list[str]) -> None:
    """Tensor parallelism: each rank computes a share of a packed projection, and all of it is gathered before it is
    halved.

    Plans are the base's, where the up projection is split by columns and the activation runs on each rank's share. Of
    [gate | value] the first of two ranks would have the gate and the second the value, and both would compute nonsense
    of the right shape. The gathering styles are known to transformers and to vLLM (and a base with such a projection,
    Phi-3, has them in its own plan); "packed_colwise" would save the gathering, but splits a bias as if it were not
    packed. Dense blocks under the same pattern compute the same as before.
    """
    for name, module in model.named_modules():
        plan = vars(module).get("_tp_plan") or {}
        prefix = f"{name}." if name else ""
        inside = [up for up in ups if up.startswith(prefix) and isinstance(get_attribute(model, up), nn.Module)]
        patterns = {_wildcard(up.removeprefix(prefix)) for up in inside}
        for pattern in patterns:
            if plan.get(pattern) != "colwise":
                continue
            from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

            now = "colwise_gather_output" in ALL_PARALLEL_STYLES  # transformers 4 has the same under other names
            plan[pattern] = "colwise_gather_output" if now else "colwise_rep"
            block = pattern.rpartition(".")[0]
            for other, style in plan.items():
                if style == "rowwise" and other.rpartition(".")[0] == block:
                    plan[other] = "rowwise_split_input" if now else "rowwise_rep"


_WRONG_SPLITS = ("colwise", "packed_colwise")

_SO = (
    "; it is damaged, or it is an unconverted model under a variant's config: download the variant again, or convert "
    "the base with hf_geglu.convert or `hf-geglu convert`"
)


def damaged(model: nn.Module, ups: list[str], info: Mapping[str, Any]) -> list[str]:
    """Weights of the converted body that a checkpoint lacks or has in another shape, and that transformers would make
    up. New heads, poolers, cross-attention and the like are no damage: no layer of the checkpoint has them.

    Args:
        model: as it was loaded.
        ups: its packed projections.
        info: transformers' loading info.
    """
    mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    made_up = set(info["missing_keys"]) | mismatched
    if not made_up:
        return []
    repeated = {_wildcard(name) for name in set(model.state_dict()) - made_up}
    renamed = any("*" in _wildcard(name) for name in info["unexpected_keys"])

    def is_damage(name: str) -> bool:
        pattern = _wildcard(name)
        of_a_site = any(name.startswith(f"{up}.") or name == up for up in ups)
        return of_a_site or ("*" in pattern and (name in mismatched or renamed or pattern in repeated))

    return sorted(filter(is_damage, made_up))


class GegluMixin:
    """What a variant's class adds to its base: it builds the sites of ``config.geglu``, ships this file when saved, and
    refuses what would load or split wrongly."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        geglu = getattr(config, "geglu", None)
        if not isinstance(geglu, Mapping):
            raise VariantLoadError(
                f"{type(self).__name__} needs a config with a `geglu` entry that lists the converted sites, but this "
                f"{type(config).__name__} has none; make one with hf_geglu.geglu_config(config) or "
                "hf_geglu.convert(model)"
            )
        if geglu["schema"] > SCHEMA:
            raise VariantLoadError(
                f"this GeGLU variant was written with schema {geglu['schema']}, this code reads up to {SCHEMA}; "
                "upgrade "
                "with `pip install -U hf_geglu`, or load it with trust_remote_code=True"
            )
        with base_activation(config), _of_the_base(config) as config_class:
            vars(self)["config_class"] = config_class  # some classes check that theirs is what they are given
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        del vars(self)["config_class"]
        build_variant_blocks(self, geglu)  # type: ignore[arg-type]
        gather_packed(self, self._packed())  # type: ignore[arg-type]

    def _packed(self) -> list[str]:
        """Paths of the packed projections, as this class has them."""
        sites = self.config.geglu["sites"]  # type: ignore[attr-defined]
        return [site["up"] for site in located_sites(self, list(sites)) if site["up"] is not None]  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, which makes up the weights that a checkpoint lacks: those of the variant's blocks and
        layers are missed here.

        Raises:
            VariantLoadError: the checkpoint lacks some, or has them in other shapes (a dense checkpoint, for one).
        """
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise VariantLoadError(f"this checkpoint has tensors of other shapes than {cls.__name__}{_SO}") from error
        lacking = damaged(model, model._packed(), info)
        if lacking:
            raise VariantLoadError(
                f"this checkpoint lacks {len(lacking)} tensors of {cls.__name__} or has them in other shapes, for "
                f"example {lacking[0]!r}, and transformers would make them up{_SO}"
            )
        return (model, info) if output_loading_info else model

    def _resolve_parallel_plans(self, *args: Any) -> Any:
        """Tensor parallelism of transformers 5, with what a user's plan asks for."""
        plans = super()._resolve_parallel_plans(*args)  # type: ignore[misc]
        for up in self._packed():
            style = next((plans[0][name] for name in (up, f"{up}.weight", f"{up}.bias") if name in plans[0]), None)
            if style in _WRONG_SPLITS:
                raise VariantLoadError(
                    f"the tensor-parallel plan splits {up} by {style!r}, but that projection holds [gate | value] and "
                    "each rank would have another part of them; leave it to the plan of the variant "
                    '(tp_plan="auto"), or use "colwise_gather_output" and, for the projection after it, '
                    '"rowwise_split_input"'
                )
        return plans

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As in transformers; this file goes along, so that the folder loads with ``trust_remote_code=True``."""
        adapter_only = getattr(self, "_hf_peft_config_loaded", False) and kwargs.get("save_peft_format", True)
        if kwargs.get("is_main_process", True) and not adapter_only and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            target = os.path.join(save_directory, "modeling_geglu.py")
            if os.path.realpath(target) != os.path.realpath(__file__):
                shutil.copyfile(__file__, target)
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


_LOCK = threading.RLock()
_MODELLING_MODULES: dict[str, None] = {}
"""Where the models are whose variants' configs were made."""


def _locked(function: Callable[..., Any]) -> Callable[..., Any]:
    """One class per base, whoever asks first."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        with _LOCK:
            return cached(*args)

    return wrapper


@_locked
def variant_config_class(base: type) -> type:
    """The config class of variants of `base`: ``BertConfig -> GegluBertConfig`` with model_type "geglu_bert"."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        geglu: Mapping[str, Any] = kwargs.get("geglu") or {}
        tripwires = {key: _swap(kwargs, key.split("."), value) for key, value in geglu.get("config", {}).items()}
        for key, value in geglu.get("saved", {}).items():
            _swap(kwargs, key.split("."), value)
        base.__init__(self, *args, **kwargs)  # type: ignore[misc]
        for key, value in tripwires.items():
            set_config_entry(self, key, value)

    def validate(self: Any) -> None:
        with base_activation(self):
            base.validate(self)  # type: ignore[attr-defined]

    def to_json_string(self: Any, *args: Any, **kwargs: Any) -> str:
        text: str = base.to_json_string(self, *args, **kwargs)  # type: ignore[attr-defined]
        keys = (getattr(self, "geglu", None) or {}).get("saved", {})
        if not keys:
            return text
        data = json.loads(text)
        for key in keys:
            _swap(data, key.split("."), TRIPWIRE)
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    _MODELLING_MODULES[base.__module__.replace(".configuration_", ".modeling_")] = None
    checks = {"validate": validate} if hasattr(base, "validate") else {}  # transformers 5
    return type(
        CLASS_PREFIX + base.__name__,
        (base,),
        {
            "__init__": __init__,
            "to_json_string": to_json_string,
            **checks,
            "__module__": __name__,
            "__doc__": f"{base.__name__} of a model whose FFN blocks are GeGLU; `geglu` lists them.",
            "model_type": MODEL_TYPE_PREFIX + base.model_type,  # type: ignore[attr-defined]
        },
    )


@_locked
def variant_model_class(base: type, config_class: type) -> type:
    """The variant of a model class: ``BertForMaskedLM -> GegluBertForMaskedLM(GegluMixin, BertForMaskedLM)``."""
    variant = type(
        CLASS_PREFIX + base.__name__,
        (GegluMixin, base),
        {
            **{name: _asked_of(base, name) for name in _JUDGED_BY_MODULE if hasattr(base, name)},
            "__module__": __name__,
            "__doc__": f"{base.__name__} whose FFN blocks are GeGLU, as its config lists them.",
            "config_class": variant_config_class(config_class),
        },
    )
    _share_checkpoint_conversions(base, variant, config_class)
    _share_recorded_outputs(base, variant)
    return variant


_JUDGED_BY_MODULE = ("is_custom_code", "_can_set_experts_implementation", "_can_set_attn_implementation")
"""What transformers decides by the module, or its source, that a class comes from. A variant is what its base is: else
non-persistent buffers would stay empty when it is loaded, and its experts would run another kernel."""


def _asked_of(base: type, name: str) -> Any:
    return classmethod(lambda cls: getattr(base, name)())


def _share_recorded_outputs(base: type, variant: type) -> None:
    """What `output_hidden_states` records is registered by class name when a model is built. One that was converted in
    memory was built as another class, and would return none."""
    for home in ("transformers.utils.output_capturing", "transformers.utils.generic"):  # version 5, version 4
        with suppress(ImportError, AttributeError):
            registry = importlib.import_module(home)._CAN_RECORD_REGISTRY
            dict.__setitem__(registry, str(variant), getattr(base, "_can_record_outputs", None))
            return


def _share_checkpoint_conversions(base: type, variant: type, config_class: type) -> None:
    """Since transformers 5 the renamings between a checkpoint and a model are keyed by class name and model type, and
    custom classes must register theirs; without this a ViT variant would lose its weights."""
    try:
        from transformers import conversion_mapping
    except ImportError:  # transformers 4: an attribute of the class, inherited
        return
    names = ((base.__name__, variant.__name__), (config_class.model_type, variant.config_class.model_type))  # type: ignore[attr-defined]
    for ours, mapping in ((new, conversion_mapping.get_checkpoint_conversion_mapping(old)) for old, new in names):
        if mapping is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


def base_class(name: str) -> type:
    """The transformers class that a variant's class is named after: ``"GegluBertForMaskedLM" -> BertForMaskedLM``."""
    import transformers

    name = name.removeprefix(CLASS_PREFIX)
    found = getattr(transformers, name, None)
    for module in () if found else _MODELLING_MODULES:
        # inner models (CLIP's towers, encoders) are not exported; they stand beside a config that was asked for before
        with suppress(ImportError):
            found = found or getattr(importlib.import_module(module), name, None)
    if not isinstance(found, type):
        raise VariantLoadError(
            f"{CLASS_PREFIX}{name} is a GeGLU variant of {name}, which transformers {transformers.__version__} does "
            "not have; install a version that has it"
        )
    return found


def __getattr__(name: str) -> Any:
    """Make the class that ``auto_map`` names: "GegluBertConfig", "GegluBertForMaskedLM"..."""
    if not name.startswith(CLASS_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = base_class(name)
    if name.endswith("Config"):
        return variant_config_class(base)
    config_class = base.config_class  # type: ignore[attr-defined]
    return variant_model_class(base, config_class)
