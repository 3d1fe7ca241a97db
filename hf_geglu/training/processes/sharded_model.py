"""A model that several processes hold shares of (FSDP2 by accelerate): shared out for a training, and whole again after
it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_geglu.errors import ConfigurationError
from hf_geglu.training.processes.sharding import is_shared, whole

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def shares_the_model(accelerator: Any) -> bool:
    """Whether each process of this accelerator will hold a share of the model only."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def share_out(model: nn.Module, accelerator: Any) -> None:
    """Give each process its share of the parameters, in place: layer by layer, and the rest together.

    accelerate would do it too, but puts embeddings and head apart, which makes two parameters out of one that is tied
    across (BERT's) and trains one of them only. Its options are followed: `fsdp_auto_wrap_policy`,
    `fsdp_transformer_layer_cls_to_wrap`, `fsdp_reshard_after_forward`, mixed precision.

    Raises:
        ConfigurationError: a model that cannot be shared out.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    single = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if single:
        raise _cannot(model, f"{single[0]} is a single number")
    plugin, ties = accelerator.state.fsdp_plugin, _ties(model)
    layers = _layers(model, plugin, ties)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(accelerator.device.type, (int(accelerator.num_processes),)),
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
    }
    try:
        for layer in layers:
            fully_shard(layer, reshard_after_forward=plugin.reshard_after_forward, **options)
        fully_shard(model, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise _cannot(model, str(error).strip().split("\n")[0]) from error
    if lost := sorted(ties - _ties(model)):
        raise _cannot(model, f"{' and '.join(lost[0])} are one parameter, and sharing them out has made them several")


def _ties(model: nn.Module) -> set[tuple[str, ...]]:
    """Names of each parameter that has several."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {tuple(group) for group in names.values() if len(group) > 1}


def _layers(model: nn.Module, plugin: Any, ties: set[tuple[str, ...]]) -> list[nn.Module]:
    """What is shared out for itself, so that only one of them is whole at a time, inner ones first: the layers that the
    config file names, or those that transformers would not split.

    Of the latter, none that hold a parameter which is tied to one outside.

    Raises:
        ConfigurationError: a named class that this model has none of, or that cannot stand alone.
    """
    if plugin.auto_wrap_policy is None:
        return []
    named = plugin.transformer_cls_names_to_wrap
    chosen: dict[str, nn.Module] = {}
    for kind in getattr(model, "_no_split_modules", None) or () if named is None else named:
        found = {path: module for path, module in model.named_modules() if path and _is(module, kind)}
        torn = [names for names in ties for path in found if len({n.startswith(f"{path}.") for n in names}) > 1]
        if named is not None and not found:
            raise _cannot(model, f"it has no layer of the class {kind} (fsdp_transformer_layer_cls_to_wrap)")
        if named is not None and torn:
            raise _cannot(model, f"{' and '.join(torn[0])} are one parameter, and {kind} holds only a part of them")
        chosen |= {} if torn else found
    return [module for path, module in model.named_modules() if path in chosen][::-1]


def _is(module: nn.Module, kind: str) -> bool:
    return any(base.__name__ == kind for base in type(module).__mro__)


def _cannot(model: nn.Module, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"FSDP with {type(model).__name__}: {reason}. Expected a model that can be shared out. Correct the FSDP "
        "options of the config file, or launch with scripts/accelerate/ddp.yaml."
    )


def reshard(model: nn.Module) -> None:
    """Give back the gathered weights that FSDP keeps after a forward without a backward.

    It would go on computing with them whatever is written into the shares (an average, the best weights).
    """
    for module in model.modules():
        if _is(module, "FSDPModule"):
            give_back: Any = module
            give_back.reshard()


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The class of a model under the one that FSDP has put over it."""
    kind: type[nn.Module] = type(model)
    return kind.__bases__[1] if kind.__bases__[0].__name__ == "FSDPModule" else kind


@contextmanager
def whole_again(model: nn.Module) -> Iterator[None]:
    """A model that is shared out, or trained by an engine, has its classes, hooks and whole parameters again when the
    block ends well.

    The weights are then on the CPU of each process, one tensor gathered after the other. After an error they stay
    shares: processes that failed apart cannot gather anything together.
    """
    before = [
        (module, type(module), {name: dict(getattr(module, name)) for name in _HOOKS}, set(vars(module)))
        for module in model.modules()
    ]
    try:
        yield
        reshard(model)
        _gather(model)
    finally:
        for module, kind, hooks, names in before:
            module.__class__ = kind
            for name, content in hooks.items():
                getattr(module, name).clear()
                getattr(module, name).update(content)
            for name in set(vars(module)) - names:
                vars(module).pop(name)
            _forget(module)
    model.to("cpu")  # its buffers


def _gather(model: nn.Module) -> None:
    made: dict[Tensor, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and (is_shared(parameter) or vars(parameter)):  # DeepSpeed hangs things on them
                if parameter not in made:
                    made[parameter] = nn.Parameter(whole(parameter).clone(), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]


def _forget(module: nn.Module) -> None:
    """torch remembers which module was sharded, and refuses to do it again."""
    from torch.distributed import _composable_state

    _composable_state._module_state_mapping.pop(module, None)
