"""The training step of `benchmarks.step`, written as each engine's users write it.

All use digits through a DataLoader, batch 64, fused AdamW, cosine schedule, gradients clipped at
norm 1, running accuracy, loss logged every 50 steps, and one thread. Timing runs from the end of
an early step to the end of the last one, so an engine's start-up does not count.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import step
from benchmarks.step import BEFORE

log: list[Any] = []
mlp: Callable[[], nn.Module]  # the command line chooses it


class Clock:
    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0
        self.started = self.ended = 0.0

    def step(self) -> bool:
        """Count a step. Return True for the last one."""
        self.done += 1
        if self.done == BEFORE:
            self.started = time.perf_counter()
        self.ended = time.perf_counter()
        return self.done == BEFORE + self.steps

    @property
    def seconds(self) -> float:
        return self.ended - self.started


def parts() -> tuple[nn.Module, torch.optim.Optimizer, Any, DataLoader[Any]]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100_000)
    return model, optimizer, schedule, loader()


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*step.digits()), batch_size=64, shuffle=True)


def naive(clock: Clock) -> None:
    """As in most tutorials: read numbers back in each step."""
    model, optimizer, schedule, batches = parts()
    while True:
        total, correct, count = 0.0, 0, 0
        for x, y in batches:
            optimizer.zero_grad()
            outputs = model(x)
            loss = F.cross_entropy(outputs, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(y)
            correct += (outputs.argmax(1) == y).sum().item()
            count += len(y)
            if clock.done % 50 == 0:
                log.append((total / count, correct / count))
            if clock.step():
                return


def ignite(clock: Clock) -> None:
    from ignite.engine import Engine, Events
    from ignite.metrics import Accuracy, RunningAverage

    model, optimizer, schedule, batches = parts()

    def update(engine: Engine, batch: tuple[Tensor, Tensor]) -> tuple[float, Tensor, Tensor]:
        x, y = batch
        optimizer.zero_grad()
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss.item(), outputs, y

    trainer = Engine(update)
    RunningAverage(output_transform=lambda out: out[0]).attach(trainer, "loss")
    Accuracy(output_transform=lambda out: (out[1], out[2])).attach(trainer, "accuracy")

    @trainer.on(Events.ITERATION_COMPLETED(every=50))
    def note(engine: Engine) -> None:
        log.append(engine.state.metrics["loss"])

    @trainer.on(Events.ITERATION_COMPLETED)
    def count(engine: Engine) -> None:
        if clock.step():
            engine.terminate()

    trainer.run(batches, max_epochs=100_000)


def accelerate(clock: Clock) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule, batches = accelerator.prepare(*parts())
    while True:
        loss_sum, correct, count = torch.zeros(()), torch.zeros(()), 0
        for x, y in batches:
            optimizer.zero_grad()
            outputs = model(x)
            loss = F.cross_entropy(outputs, y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach() * len(y)
            correct += (outputs.argmax(1) == y).sum()
            count += len(y)
            if clock.done % 50 == 0:
                log.append((loss.item(), correct.item() / count))
            if clock.step():
                return


def fabric(clock: Clock) -> None:
    from lightning.fabric import Fabric

    engine = Fabric(accelerator="cpu", devices=1)
    model, optimizer, schedule, batches = parts()
    model, optimizer = engine.setup(model, optimizer)
    batches = engine.setup_dataloaders(batches)
    while True:
        loss_sum, correct, count = torch.zeros(()), torch.zeros(()), 0
        for x, y in batches:
            optimizer.zero_grad()
            outputs = model(x)
            loss = F.cross_entropy(outputs, y)
            engine.backward(loss)
            engine.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            schedule.step()
            loss_sum += loss.detach() * len(y)
            correct += (outputs.argmax(1) == y).sum()
            count += len(y)
            if clock.done % 50 == 0:
                log.append((loss.item(), correct.item() / count))
            if clock.step():
                return


def transformers(clock: Clock) -> None:
    """No running accuracy, because its Trainer does not support one."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            outputs = self.body(x)
            return {"loss": F.cross_entropy(outputs, labels), "logits": outputs}

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            clock.step()

    inputs, targets = step.digits()
    rows = [{"x": x, "labels": y} for x, y in zip(inputs, targets, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=BEFORE + clock.steps,
            per_device_train_batch_size=64,
            learning_rate=1e-3,
            optim="adamw_torch_fused",
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            logging_steps=50,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(WithLoss(), arguments, train_dataset=rows, callbacks=[Count()]).train()


def lightning_lean(clock: Clock) -> None:
    """Everything that can be switched off is off."""
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.correct, self.count = torch.zeros(()), 0

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, y = batch
            outputs = self.body(x)
            loss = F.cross_entropy(outputs, y)
            self.correct += (outputs.argmax(1) == y).sum()
            self.count += len(y)
            if index % 50 == 0:
                log.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100_000)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    lightning_trainer(clock, logger=False, enable_checkpointing=False).fit(Module(), loader())


def lightning_template(clock: Clock) -> None:
    """As the most popular Lightning-Hydra template sets it up: metrics as objects, logged over the
    epoch and shown in a rich bar, with a CSV logger, checkpoints and early stopping.
    """
    import lightning as L
    from lightning.pytorch.callbacks import (
        EarlyStopping,
        ModelCheckpoint,
        RichModelSummary,
        RichProgressBar,
    )
    from lightning.pytorch.loggers import CSVLogger
    from torchmetrics import MeanMetric
    from torchmetrics.classification import MulticlassAccuracy

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.train_loss, self.train_acc = MeanMetric(), MulticlassAccuracy(10, average="micro")

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, y = batch
            outputs = self.body(x)
            loss = F.cross_entropy(outputs, y)
            self.train_loss(loss)
            self.train_acc(outputs.argmax(1), y)
            once = {"on_step": False, "on_epoch": True, "prog_bar": True}
            self.log("train/loss", self.train_loss, **once)
            self.log("train/acc", self.train_acc, **once)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100_000)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    with tempfile.TemporaryDirectory() as folder:
        callbacks = [
            ModelCheckpoint(f"{folder}/checkpoints", monitor="train/acc", mode="max"),
            EarlyStopping("train/acc", mode="max", patience=100_000, check_on_train_epoch_end=True),
            RichModelSummary(max_depth=-1),
            RichProgressBar(),
        ]
        options = {"enable_progress_bar": True, "enable_model_summary": True}
        trainer = lightning_trainer(
            clock, logger=CSVLogger(folder), callbacks=callbacks, default_root_dir=folder, **options
        )
        trainer.fit(Module(), loader())


def lightning_trainer(clock: Clock, *, callbacks: list[Any] | None = None, **options: Any) -> Any:
    import lightning as L

    class Count(L.Callback):
        def on_train_batch_end(self, *arguments: Any, **rest: Any) -> None:
            clock.step()

    plain = {"enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=BEFORE + clock.steps,
        gradient_clip_val=1.0,
        log_every_n_steps=50,
        limit_val_batches=0,
        callbacks=[*(callbacks or []), Count()],
        **{**plain, **options},
    )


ENGINES: tuple[Callable[[Clock], None], ...] = (
    naive,
    ignite,
    accelerate,
    fabric,
    transformers,
    lightning_lean,
    lightning_template,
)


def main(name: str, steps: int) -> None:
    engine = next(engine for engine in ENGINES if engine.__name__ == name)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with os.fdopen(os.dup(1), "w") as said, Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            for _ in sys.stdin:
                clock = Clock(steps)
                engine(clock)
                said.write(f"{clock.seconds}\n")
                said.flush()


if __name__ == "__main__":
    mlp = functools.partial(step.mlp, sys.argv[3] == "small")
    main(sys.argv[1], int(sys.argv[2]))
