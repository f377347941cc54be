"""Refuse, before a run starts, a model that it could not train, average, save or restore."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from regrow.config.own_code import owner_of, places_of
from regrow.config.targets import named_packages
from regrow.errors import UserError, brief
from regrow.feeding.batch import each, parts_of
from regrow.numerics.buffers import Buffers, caches
from regrow.numerics.calls import call, is_out_of_memory
from regrow.numerics.capture import attributes_of, differing
from regrow.numerics.precision import autocast
from regrow.protocols import Batch, Task
from regrow.randomness import states_kept
from regrow.runs import fault_checks


def check_first_batch(model: nn.Module, task: Task, batch: Batch, precision: str) -> list[str]:
    """Run one batch through model and loss in evaluation mode, to fail before training starts.

    Returns a line for each mistake that stops no run: see `fault_checks.Calls` and `of_inputs`.
    """
    calls = fault_checks.Calls()
    model.eval()
    try:  # some models count calls in evaluation mode too
        with buffers_kept(model), autocast(parts_of(batch.targets)[0].device, precision):
            outputs = call(model, batch.inputs)  # task.check reads the last layer off the graph
            task.check(outputs, batch.targets)
            with calls:
                task.loss(outputs, batch.targets, batch.weights)
    finally:
        model.train()
    return [*calls.found.values(), *fault_checks.of_inputs(batch)]


def check_what_fits(
    model: nn.Module, task: Task, batch: Batch, precision: str
) -> tuple[Batch, list[str]]:
    """Check the batch, or as many of its examples as memory allows. Returns these and the lines.

    An evaluation keeps no graph, as the check does, and a step may split its batch: both may fit
    where the check does not. Raises UserError if one example does not fit.
    """
    while True:
        try:
            return batch, check_first_batch(model, task, batch, precision)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch.num_local < 2:
                raise UserError(
                    "trainer.check_first_batch: out of memory with one example. Use a smaller "
                    "model or input, trainer.precision=bf16, or a device with more memory."
                ) from None  # from `error`, it would be told as a fault of the machine
        batch = batch.split(2)[0]  # not above: the error's traceback holds the graph


@torch.no_grad()
def check_metrics(
    model: nn.Module, task: Task, batch: Batch, precision: str, *, gathers: bool
) -> None:
    """Measure one batch, as an evaluation does, so that a task's own metrics fail before training.

    Lets through errors that a whole set or a trained model may not give. Without `gathers` it only
    counts the batch, because `scalars` may wait for the other processes.
    """
    device = parts_of(batch.targets)[0].device
    with states_kept():
        model.eval()
        try:
            with buffers_kept(model), autocast(device, precision):
                outputs = call(model, batch.inputs)
        finally:
            model.train()
        metrics = task.metrics(device)
        if batch.num_local < 2 or metrics is task.metrics(device):  # the same would keep the batch
            return
        targets = each(batch.targets, Tensor.clone)  # the data's own memory must stay as it is
        is_update = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a batch may lack a class
            try:
                metrics.update(outputs, targets, batch.weights)
                is_update = False
                if gathers:
                    metrics.details()
                    metrics.scalars()
            except Exception as error:
                if (_is_of_update if is_update else _is_of_the_code)(error):
                    raise


def _is_of_the_code(error: Exception) -> bool:
    """Return True if no other examples would avoid the error, as with a wrong name."""
    kinds = AttributeError | ImportError | NameError | NotImplementedError | TypeError
    # Some code gives a name its value only if a batch has, say, both classes.
    of_one_batch = isinstance(error, UnboundLocalError) or "NoneType" in str(error)
    return isinstance(error, kinds) and not of_one_batch


def _is_of_update(error: Exception) -> bool:
    """Return True if the evaluation's `update` would fail like this one, with the same batch.

    An untrained model may cause numbers without a result, and few examples or one class what
    libraries such as scikit-learn refuse.
    """
    if isinstance(error, ArithmeticError | torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return False
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return False
    raised_in = owner_of(next(places_of(error)).file, frozenset(named_packages()))
    return raised_in == "own" or not isinstance(error, ValueError | LookupError)


def check_soft_targets(model: nn.Module, task: Task, batch: Batch, precision: str) -> None:
    """Raise UserError if task and loss do not take the soft targets of mixed examples."""
    try:
        check_first_batch(model, task, batch, precision)
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"data.mixing: the loss does not take soft targets ({brief(error, 120)}). Let it take "
            "probabilities (B, C), as loss=cross_entropy does, or set data.mixing=null."
        ) from error


@torch.no_grad()
def check_one_example(model: nn.Module, batch: Batch, precision: str) -> None:
    """Raise UserError if the model cannot train on a micro-batch of one example."""
    batch = batch.split(max(1, batch.num_local))[0]
    try:
        with buffers_kept(model), autocast(parts_of(batch.targets)[0].device, precision):
            call(model.train(), batch.inputs)
    except ValueError as error:  # BatchNorm cannot compute a variance
        raise UserError(
            "a step's smallest micro-batch is one example, and this model cannot train on one: "
            f"{brief(error)}. Use data.drop_last=true, another data.batch_size, "
            "fewer trainer.accumulation_steps or a model without BatchNorm."
        ) from None


HALF = (torch.float16, torch.bfloat16)


def check_types(models: Mapping[str, object]) -> None:
    """Raise UserError if one of the models by name, "" for a single one, is not a module."""
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            key = f"model.{name}" if name else "model"
            raise UserError(
                f"{key}: its _target_ gave {type(model).__name__}, which is not a torch.nn.Module. "
                "Derive the class from nn.Module, or return the module from the function."
            )


def has_lazy_parts(model: nn.Module) -> bool:
    return any(is_lazy(tensor) for tensor in _tensors(model).values())


@torch.no_grad()
def materialise(model: nn.Module, batch: Batch) -> None:
    """Initialise lazy modules from a batch, on the CPU, before anything uses their parameters.

    Raises UserError if some parameters stay uninitialised, or if forward creates others.
    """
    before = _tensors(model).keys()
    call(model.eval(), each(_few(batch).inputs, Tensor.cpu))
    model.train()
    if made := _tensors(model).keys() - before:
        raise UserError(
            f"model: forward makes {', '.join(sorted(made))}. Register it in __init__, with its "
            "final shape and dtype."
        )
    left = [name for name, tensor in _tensors(model).items() if is_lazy(tensor)]
    if left:
        raise UserError(
            f"model: {', '.join(left)} of lazy modules have no shape after a forward pass. "
            "Use these modules in forward, or give their sizes in __init__."
        )


def check(model: nn.Module, ema_decay: float | None) -> None:
    """Raise UserError for a parameter, buffer or module that training cannot handle."""
    for name, tensor in _tensors(model).items():
        _check_tensor(name, tensor)
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise UserError(
                f"model: the parameter {name} is {_dtype(parameter)}. Keep a real parameter with a "
                "last dimension of 2, and use torch.view_as_complex on it in forward."
            )
        if ema_decay is not None and parameter.dtype in HALF:
            raise UserError(
                f"trainer.ema_decay={ema_decay:g}: the parameter {name} is {_dtype(parameter)}, "
                "too coarse for an average. Keep float32 parameters and use "
                "trainer.precision=bf16, or use trainer.ema_decay=null."
            )
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_embedding = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if is_embedding and module.sparse and isinstance(weight, Tensor) and weight.requires_grad:
            raise _sparse(name or type(module).__name__)
    _check_extra_state(model, ema_decay)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise UserError(
            f"model: {name} is on the meta device and has no values. Make it on the CPU."
        )
    if tensor.layout is not torch.strided:
        raise UserError(
            f"model: {name} is a sparse tensor ({tensor.layout}), which checkpoints cannot hold. "
            "Keep its indices and values as two buffers, and join them in forward."
        )
    if tensor.is_conj() or tensor.is_neg():
        raise UserError(f"model: {name} is a conjugated view. Add .resolve_conj().resolve_neg().")
    if torch._debug_has_internal_overlap(tensor) == 1:  # e.g. from expand()
        raise UserError(
            f"model: several elements of {name} share their memory, so no value can be loaded into "
            "it. Add .clone() after expand()."
        )


def _check_extra_state(model: nn.Module, ema_decay: float | None) -> None:
    """Raise UserError if an entry from get_extra_state cannot be averaged or saved."""
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            continue
        if ema_decay is not None:
            raise UserError(
                f"trainer.ema_decay={ema_decay:g}: {name} of the model's state is a "
                f"{type(value).__name__}, which has no average. Keep it in a buffer, or use "
                "trainer.ema_decay=null."
            )
        file = io.BytesIO()
        try:
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:  # pickle raises errors of many classes
            raise UserError(
                f"model: {name} of the model's state is a {type(value).__name__}, which no "
                "checkpoint is opened with. Let get_extra_state return tensors, numbers, text, "
                "lists and dicts only."
            ) from error


def check_forward(
    model: nn.Module,
    averaged: nn.Module | None,
    batch: Batch,
    precision: str,
    *,
    before: Mapping[str, str],
    is_sharded: bool,
    needs_all: bool,
    compiles: bool,
) -> list[str]:
    """Raise UserError for faults that only a forward pass in training mode shows. Leaves no trace.

    `before`: the model as `described` before any forward pass. `needs_all`: True if each trainable
    parameter must get a gradient, as in DDP. Returns warnings.
    """
    if batch.num_local < 2:  # BatchNorm may refuse one example
        return []
    odd = []
    # With few examples, an expert of several may see none.
    few = batch if needs_all else _few(batch)
    with buffers_kept(model, averaged), autocast(parts_of(batch.targets)[0].device, precision):
        attributes = attributes_of([model.train()])
        try:
            with torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext():
                outputs = call(model, few.inputs)
        except Exception:  # e.g. ghost batch normalisation, which needs more than two examples
            return []
        grown = _check_buffers(model, before)
        attribute = differing(attributes, attributes_of([model]))
        if (grown or attribute) and not is_sharded:  # else all ranks must run equally many passes
            depends = False
            with (
                torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext(),
                contextlib.nullcontext() if grown else contextlib.suppress(Exception),
            ):
                # A copy, which may fail, as nothing takes back what happens to an attribute.
                depends = _depends_on_history(model if grown else copy.deepcopy(model), few)
            if depends and grown:
                raise UserError(
                    f"model: forward changes {', '.join(grown)}, and the outputs for the same "
                    "inputs with it. A checkpoint holds no buffer of persistent=False, so a "
                    "resumed run would differ. Keep nothing of one batch for the next one."
                )
            if depends:
                odd.append(
                    f"model: forward changes {attribute}, and the outputs for the same inputs with "
                    "it. A checkpoint does not hold it, so a resumed run would differ. Register it "
                    "as a buffer."
                )
        nodes = [*_graph(outputs)]
        leaves = {id(leaf): leaf for leaf in map(_leaf, nodes) if leaf is not None}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for node in nodes:
            if getattr(node, "_saved_sparse", False):
                inputs = (_leaf(following) for following, _ in node.next_functions)
                raise _sparse(next((names[id(i)] for i in inputs if id(i) in names), "a module"))
        if not is_sharded:  # a sharded model's forward pass uses gathered copies
            _check_leaves(model, leaves, names, needs_all)
        if averaged is not None and not is_sharded:
            _check_copy(averaged, few, names)
    return odd


def _check_buffers(model: nn.Module, before: Mapping[str, str]) -> list[str]:
    """Raise UserError for a part of the state whose dtype or shape a forward pass changes.

    Returns the caches (non-persistent buffers) that it created or replaced with another shape.
    """
    after = described(model)
    changed = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    cached = caches(model)
    for name in changed:
        if name not in cached:
            was, now = before.get(name, "missing"), after.get(name, "missing")
            raise UserError(
                f"model: forward changes {name} (before: {was}, after: {now}), so a checkpoint "
                "would not fit the model. Register it in __init__, with its final shape and dtype, "
                "or, if it is a cache, with persistent=False."
            )
    for name, buffer in model.named_buffers():
        if buffer.grad_fn is not None:
            raise UserError(
                f"model: the buffer {name} keeps the graph of its forward pass, which the next "
                "step cannot use. Assign a detached value: .detach()."
            )
    return [name for name in changed if name in cached]


def _depends_on_history(model: nn.Module, few: Batch) -> bool:
    """Return True if outputs depend on earlier ones by what checkpoints do not hold.

    These are caches (non-persistent buffers) and plain attributes.
    """
    found = []
    cached = caches(model)
    persistent = {n: b.clone() for n, b in model.named_buffers() if n not in cached}
    with buffers_kept(model):
        for _ in range(2):  # the second pass starts with what the first one left
            with states_kept():
                found.append([*_found(call(model, few.inputs))])
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name in persistent:
                        buffer.copy_(persistent[name])
    pairs = [
        [t if t.is_complex() else t.float() for t in pair] for pair in zip(*found, strict=True)
    ]
    return not all(
        one.shape == two.shape and torch.allclose(one, two, *_tolerance(one), equal_nan=True)
        for one, two in pairs
    )


def _tolerance(outputs: Tensor) -> tuple[float, float]:
    return (0.0, 0.0) if outputs.device.type == "cpu" else (1e-3, 1e-5)


def _check_leaves(
    model: nn.Module, leaves: Mapping[int, Tensor], names: Mapping[int, str], needs_all: bool
) -> None:
    for key, leaf in leaves.items():
        if isinstance(leaf, nn.Parameter) and key not in names:
            raise UserError(
                f"model: forward uses a parameter of shape {tuple(leaf.shape)} that the model does "
                "not list, so it would not be trained or saved. Use nn.ModuleList or "
                "nn.ModuleDict in place of a list or dict, or freeze it with requires_grad_(False)."
            )
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not trainable.keys() & leaves.keys():
        raise UserError(
            "model: its outputs depend on no trainable parameter, so nothing would be trained. "
            "Remove detach(), no_grad() or argmax() from forward."
        )
    unused = [name for key, name in trainable.items() if key not in leaves]
    if needs_all and unused:
        raise UserError(
            f"trainer.ddp.find_unused_parameters=false: {', '.join(unused[:5])} gets no gradient "
            "from the first batch. Use trainer.ddp.find_unused_parameters=true, or freeze it."
        )


def _check_copy(averaged: nn.Module, few: Batch, names: Mapping[int, str]) -> None:
    """Raise UserError if the copy uses the original's parameters, as closures and hooks do."""
    try:
        outputs = call(averaged, few.inputs)
    except Exception:
        return
    for leaf in map(_leaf, _graph(outputs)):
        if leaf is not None and leaf.requires_grad and id(leaf) in names:
            raise UserError(
                f"trainer.ema_decay: a copy of the model still uses {names[id(leaf)]} of the "
                "original, as a lambda or a hook that refers to self does. Use a method or "
                "module instead, or trainer.ema_decay=null."
            )


def _graph(outputs: Any) -> Iterator[Any]:
    """Yield each node of the graph behind `outputs` once."""
    seen: set[Any] = set()
    waiting = [tensor.grad_fn for tensor in _found(outputs)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node


def _leaf(node: Any) -> Tensor | None:
    return node.variable if type(node).__name__ == "AccumulateGrad" else None


def _found(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    items: Iterable[Any] = value.values() if isinstance(value, Mapping) else ()
    for item in value if isinstance(value, list | tuple) else items:
        yield from _found(item)


@contextlib.contextmanager
def buffers_kept(*models: nn.Module | None) -> Iterator[None]:
    """Restore the models' buffers afterwards."""
    kept = [Buffers(model) for model in models if model is not None]
    try:
        yield
    finally:
        for buffers in kept:
            buffers.restore()


def _few(batch: Batch) -> Batch:
    """Return the first two or three examples."""
    few: Batch = batch.split(max(1, batch.num_local // 2))[0]
    return few


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def described(model: nn.Module) -> dict[str, str]:
    """Return the dtype and shape of each parameter and buffer."""
    return {name: f"{_dtype(t)} {tuple(t.shape)}" for name, t in _tensors(model).items()}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _sparse(name: str) -> UserError:
    return UserError(
        f"model: {name} gives sparse gradients, which cannot be clipped or averaged. Use "
        "sparse=False."
    )
