"""One training from its first step to its last, in whatever precision, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS

from precision_runtime.auditing.executing.randomness import reseed
from precision_runtime.auditing.executing.worlds import clone
from precision_runtime.errors import ConfigurationError
from precision_runtime.stepping.master import master_of
from precision_runtime.training.gatekeeper import Gatekeeper, clear, finite
from precision_runtime.training.lesson import Lesson
from precision_runtime.tree import leaves


@dataclass(frozen=True)
class Trouble:
    """The first value that is not finite: in which step, in what ("loss", "gradient", "update") and whose."""

    step: int
    phase: str
    name: str = ""


@dataclass(eq=False)
class Course:
    """What a training did. Tensors are copies; ``start`` and ``end`` hold parameters and floating buffers by path.

    ``first`` are the gradients that the first step was taken with, ``norms`` those of every step taken, by parameter;
    ``left`` are those that the first backward pass left, where the user's own function steps.
    ``taken`` and ``cleared`` say for each step whether the optimizer stepped, and whether gradients were forgotten
    before it. ``rates`` are the learning rates after each step.
    """

    start: dict[str, torch.Tensor] = field(default_factory=dict)
    end: dict[str, torch.Tensor] = field(default_factory=dict)
    early: dict[str, torch.Tensor] = field(default_factory=dict)  # what ``state`` was after the first step taken
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: list[torch.Tensor] = field(default_factory=list)
    first: dict[str, torch.Tensor] = field(default_factory=dict)
    left: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    taken: list[bool] = field(default_factory=list)
    cleared: list[bool] = field(default_factory=list)
    rates: list[tuple[float, ...]] = field(default_factory=list)
    trouble: Trouble | None = None
    loss_trouble: Trouble | None = None
    broken: list[str] = field(default_factory=list)  # tensors of the optimizer that are not finite in the end

    @property
    def steps(self) -> int:
        """Steps begun, skipped ones included."""
        return len(self.losses)


class Observer:
    """What may look on, and change, at each step. This one does nothing."""

    def inputs(self, place: int, batch: Any) -> Any:
        """The batch as this training sees it; ``place`` tells batches apart."""
        return batch

    def around(self, step: int) -> AbstractContextManager[Any]:
        """The context of a whole step."""
        return nullcontext()

    def before_loss(self, model: nn.Module, batch: Any, seed: int) -> None:
        """The loss is about to be computed; random draws are seeded by ``seed``."""

    def after_loss(self, model: nn.Module) -> None:
        """It has been."""

    def before_update(self) -> None:
        """The optimizer is about to step."""

    def after_update(self) -> None:
        """It has."""

    def after_step(self) -> None:
        """All is stored that this step makes."""


@dataclass(frozen=True)
class Verbs:
    """How a loss is differentiated and a step is taken, where the user has no function of his own for it, and in which
    dtypes a batch is given.
    """

    backward: Callable[[torch.Tensor], Any]
    step: Callable[..., Any]
    cast: Callable[[Any], Any]


class Runner:
    """Trains one model. ``phase`` says what is going on ("forward", "backward", "update"), for who asks after an error.

    ``like`` is a course whose skipped steps and forgotten gradients are to be repeated: a step that a loss scaler
    skipped is no error of the precision.
    """

    def __init__(
        self, lesson: Lesson, model: nn.Module, optimizer: Any, verbs: Verbs, observer: Observer | None = None,
        like: Course | None = None, steps: int | None = None,
    ) -> None:  # fmt: skip
        self.lesson, self.model, self.optimizer, self.verbs = lesson, model, optimizer, verbs
        self.observer, self.like = observer or Observer(), like
        self.steps = lesson.steps if steps is None else steps
        self.course, self.phase, self.number = Course(), "forward", 0
        self._gate = Gatekeeper(optimizer, self._before, self._after)
        self._stale = True

    def run(self) -> Course:
        """Train to the end, or to the first step that leaves something that is not finite."""
        course = self.course
        course.start = values(self.model)
        for number in range(self.steps):
            self.number = number
            place, batch = self.lesson.batch(number)
            with self.observer.around(number):
                self._step(self.observer.inputs(place, self.verbs.cast(clone(batch))))
            if course.trouble is not None:
                break
        course.end = values(self.model)
        course.state = states(self.model, self.optimizer)
        course.broken = [path for path, t in hidden(self.optimizer, self.model) if not finite([t.detach()])]
        return course

    def _step(self, batch: Any) -> None:
        course, number = self.course, self.number
        torch.clear_autocast_cache()  # inside somebody's autocast, half copies of the weights would outlive a step
        seed = self.lesson.seed + 1 + number
        cleared = self._to_clear() if self.like is None else self.like.cleared[number]
        if cleared:
            clear(self.model, self.optimizer)
        course.cleared.append(cleared)
        self._gate.open = self.like is None or self.like.taken[number]
        before = self._gate.count
        self.phase = "forward"
        self.observer.before_loss(self.model, batch, seed)
        reseed(seed)
        loss = self._loss(batch)
        self.observer.after_loss(self.model)
        course.losses.append(loss.detach().to("cpu", torch.float64))
        if not finite([course.losses[-1]]) and course.loss_trouble is None:
            course.loss_trouble = Trouble(number, "loss")
        if self.lesson.step_fn is not None:
            self.phase = "update"
            with self._noting_what_is_left():
                self.lesson.step_fn(self.model, self.optimizer, loss)
        elif isinstance(self.optimizer, LBFGS):
            self._search(batch, loss, seed)
        else:
            self.phase = "backward"
            self.verbs.backward(loss)
            self.phase = "update"
            self.verbs.step()
        self.observer.after_step()
        taken = self._gate.count > before
        course.taken.append(taken)
        self._stale = taken
        course.rates.append(_rates(self.optimizer))
        if taken and course.loss_trouble is not None and course.loss_trouble.step == number:
            course.trouble = course.loss_trouble

    @contextmanager
    def _noting_what_is_left(self) -> Iterator[None]:
        """Note the gradients as the first backward pass leaves them, before anything is done to them or added."""
        handles = []
        for name, p in self.model.named_parameters() if not self.course.first else ():

            def note(p: torch.Tensor, name: str = name) -> None:
                if not self.course.first and p.grad is not None and p.grad.layout is torch.strided:
                    self.course.left.setdefault(name, p.grad.detach().clone())

            if p.requires_grad:
                handles.append(p.register_post_accumulate_grad_hook(note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _search(self, batch: Any, loss: torch.Tensor, seed: int) -> None:
        known: list[torch.Tensor] = [loss]

        def closure() -> torch.Tensor:
            clear(self.model, self.optimizer)
            if not known:
                reseed(seed)
            value = known.pop() if known else self._loss(batch)
            self.verbs.backward(value)
            return value

        self.phase = "update"
        self.verbs.step(closure)

    def _loss(self, batch: Any) -> torch.Tensor:
        loss = self.lesson.loss_fn(self.model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ConfigurationError(f"loss_fn(model, batch) returned {what}; it is to return the loss, one number")
        return loss

    def _to_clear(self) -> bool:
        """Gradients go after a step. Those of one that ``step_fn`` has not taken are kept, to accumulate, unless they
        are spoilt; without it, a step not taken is a skipped one: masters have let go of its gradients already.
        """
        return self._stale or self.lesson.step_fn is None or not finite(list(gradients(self.model).values()))

    def _before(self) -> None:
        course = self.course
        grads = gradients(self.model)
        if not course.first:
            course.first = {name: g.detach().clone() for name, g in grads.items()}
        for name, g in grads.items():
            course.norms.setdefault(name, []).append(torch.linalg.vector_norm(g.detach().to(torch.float64)))
        if course.trouble is None:
            bad = [name for name, g in grads.items() if not finite([g])]
            if bad:
                course.trouble = Trouble(self.number, "gradient", bad[-1])
        self.observer.before_update()

    def _after(self) -> None:
        if self._gate.count == 1:
            self.course.early = states(self.model, self.optimizer)
        self.observer.after_update()
        if self.course.trouble is None:
            bad = [name for name, p in self.model.named_parameters() if not finite([p.detach()])]
            if bad:
                self.course.trouble = Trouble(self.number, "update", bad[0])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients by the parameter's path, also those that have moved to a master."""
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad
        if grad is None and (master := master_of(p)) is not None:
            grad = master.grad
        if grad is not None:
            found[name] = grad.to_dense() if grad.layout is not torch.strided else grad
    return found


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of parameters, floating buffers and floating tensors kept as plain attributes, by path."""
    found: dict[str, torch.Tensor] = {}
    for path, t in held(model):
        found[path] = t.detach().clone()
    return found


def held(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters, floating buffers and floating tensor attributes, by path; tied ones once."""
    found: list[tuple[str, torch.Tensor]] = list(model.named_parameters())
    found += [(path, b) for path, b in model.named_buffers() if b.is_floating_point()]
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout is torch.strided:
                found.append((f"{path}.{name}" if path else name, value))
    return found


def states(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """Copies of what an optimizer keeps in the shape of a parameter.

    In the state of one of torch's: ``exp_avg of layer.weight``. In attributes of any: ``['averages'][0]``.
    """
    found = {}
    own = getattr(optimizer, "state", None)
    ours = {id(p) for p in model.parameters()}
    shapes = {p.shape for p in model.parameters() if p.dim()}
    attributes = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    for path, t in leaves(attributes):
        if t.is_floating_point() and t.shape in shapes and id(t) not in ours:
            found[path] = t.detach().clone()
    if not isinstance(own, dict):
        return found
    for name, p in model.named_parameters():
        master = master_of(p)
        for key, value in (own.get(p) or (own.get(master) if master is not None else None) or {}).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == p.shape and value.dim():
                found[f"{key} of {name}"] = value.detach().clone()
    return found


def hidden(optimizer: Any, model: nn.Module) -> Sequence[tuple[str, torch.Tensor]]:
    """Floating tensors anywhere in an optimizer, by path; in its state ``'exp_avg' of layer.weight``."""
    own = getattr(optimizer, "state", None)
    if not isinstance(own, dict):
        return [(path, t) for path, t in leaves(vars(optimizer)) if t.is_floating_point()]
    names = {id(t): name for name, p in model.named_parameters() for t in (p, master_of(p)) if t is not None}
    found = list(leaves({k: v for k, v in vars(optimizer).items() if k != "state"}))
    for key, kept in own.items():
        of = names.get(id(key), "a tensor") if isinstance(key, torch.Tensor) else repr(key)
        if isinstance(kept, dict):
            found += [(f"{name!r}{path} of {of}", t) for name, value in kept.items() for path, t in leaves(value)]
        else:
            found += [(f"state{path} of {of}", t) for path, t in leaves(kept)]
    return [(path, t) for path, t in found if t.is_floating_point()]


def _rates(optimizer: Any) -> tuple[float, ...]:
    groups = getattr(optimizer, "param_groups", None)
    return tuple(float(g["lr"]) for g in groups if "lr" in g) if isinstance(groups, list) else ()
