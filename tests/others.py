"""Run the snippets of docs/coming_from.md that are of other engines: python tests/others.py LABEL.

Needs the packages of `make peers` on PYTHONPATH. Reads the snippets as JSON from the standard
input, in their order, and runs them in the one namespace that a user of that engine would have.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
import torchmetrics
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

Names = dict[str, Any]
FRESH = "makes further names for each snippet"


class Points(Dataset[Any]):
    def __init__(self, as_dict: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(32, 4, generator=draw)
        self.targets = torch.arange(32) % 3
        self.as_dict = as_dict

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        pair = self.inputs[index], self.targets[index]
        return dict(zip(("inputs", "labels"), pair, strict=True)) if self.as_dict else pair


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, inputs: Any, labels: Any = None) -> Any:
        logits = self.layer(inputs)
        return (
            logits if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}
        )


def norm_of(model: torch.nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.detach() for p in model.parameters()]))


def shared(folder: Path) -> Names:
    data = Points(as_dict=False)
    inputs, targets = data[0]
    return {
        "torch": torch,
        "torchmetrics": torchmetrics,
        "norm_of": norm_of,
        "folder": str(folder / "run"),
        "file": folder / "last.pt",
        "dataset": data,
        "loader": DataLoader(data, 8),
        "model": Net(),
        "step": 3,
        "inputs": inputs[None],
        "targets": targets[None],
        "accuracy": 0.9,
        "best": 0.8,
        "kappa": torchmetrics.CohenKappa(task="multiclass", num_classes=3),
        "predictions": targets[None],
        "evaluations_without_improvement": 0,
        "optuna": optuna,
        "study": optuna.create_study(),
        "train": lambda model, optimizer, *_: optimizer.step(),
        "evaluate": lambda model, *_: norm_of(model),
        "loss_of": lambda model: cross_entropy(model(inputs[None]), targets[None]),
    }


def of_lightning(folder: Path) -> tuple[Names, Callable[[Names], None]]:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.kappa = torchmetrics.CohenKappa(task="multiclass", num_classes=3)

        def forward(self, inputs: Any) -> Any:
            return self.net(inputs)

        def loss(self, batch: Any) -> Any:
            return cross_entropy(self(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def quiet(**more: Any) -> Any:
        return Trainer(
            default_root_dir=folder, max_epochs=1, logger=False, enable_progress_bar=False, **more
        )

    def fit_with_the_printed_methods(names: Names) -> None:
        for name in ("training_step", "validation_step", "configure_optimizers"):
            setattr(Module, name, names[name])
        trainer = quiet(callbacks=[EarlyStopping(monitor="val/kappa", mode="max")])
        trainer.fit(Module(), names["loader"], names["loader"])
        logged = trainer.callback_metrics
        assert {"train/weight_norm", "val/kappa"} <= set(logged), logged
        assert len(names["study"].trials) == 4

    class Tuned(Module):
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.lr = lr

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.kappa.update(self(batch[0]), batch[1])
            self.log("val/kappa", self.kappa)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    names = {
        "Trainer": Trainer,
        "EarlyStopping": EarlyStopping,
        "ModelCheckpoint": ModelCheckpoint,
        "Module": Tuned,
        "trainer": quiet(),
        "module": Module(),
    }
    return names, fit_with_the_printed_methods


def of_the_template(folder: Path) -> tuple[Names, Callable[[Names], None]]:
    from lightning.pytorch import LightningModule, Trainer

    class MNISTLitModule(LightningModule):  # what src/models/mnist_module.py has besides
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.val_kappa = torchmetrics.CohenKappa(task="multiclass", num_classes=3)

        def model_step(self, batch: Any) -> Any:
            logits = self.net(batch[0])
            return cross_entropy(logits, batch[1]), logits.argmax(dim=1), batch[1]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit_with_the_printed_methods(names: Names) -> None:
        for name in ("training_step", "validation_step"):
            setattr(MNISTLitModule, name, names[name])
        trainer = Trainer(max_epochs=1, logger=False, enable_progress_bar=False)
        trainer.fit(MNISTLitModule(), names["loader"], names["loader"])
        logged = trainer.callback_metrics
        assert {"train/weight_norm", "val/kappa"} <= set(logged), logged

    return {}, fit_with_the_printed_methods


def of_trainer(folder: Path) -> tuple[Names, Callable[[Names], None]]:
    from sklearn.metrics import cohen_kappa_score
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

    data = Points(as_dict=True)

    def arguments() -> Any:  # a later one takes the state from an earlier one
        place = str(folder / "hf")
        return TrainingArguments(
            place, max_steps=2, save_steps=1, report_to="none", disable_tqdm=True
        )

    def trainer() -> Any:
        return Trainer(
            args=arguments(), train_dataset=data, eval_dataset=data, model_init=lambda trial: Net()
        )

    def fresh() -> Names:
        return {"arguments": arguments(), "trainer": trainer()}

    trainer().train()  # leaves checkpoints to resume from

    def evaluate_with_the_printed_metric(names: Names) -> None:
        compute = names["compute_metrics"]
        measured = Trainer(Net(), arguments(), eval_dataset=data, compute_metrics=compute)
        assert "eval_kappa" in measured.evaluate()
        assert len(names["best"].hyperparameters) == 1

    on_this_machine = functools.partial(TrainingArguments, use_cpu=not torch.cuda.is_available())
    names = {
        "Trainer": Trainer,
        "TrainingArguments": on_this_machine,
        FRESH: fresh,
        "EarlyStoppingCallback": EarlyStoppingCallback,
        "cohen_kappa_score": cohen_kappa_score,
    }
    return names, evaluate_with_the_printed_metric


def of_accelerate(folder: Path) -> tuple[Names, Callable[[Names], None]]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def renewed(**settings: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)  # else the first settings stay
        return Accelerator(cpu=True, **settings)

    def fresh() -> Names:
        accelerator = renewed()
        optimizer = torch.optim.SGD((model := Net()).parameters(), lr=0.1)
        loader = DataLoader(Points(as_dict=False), 8)
        prepared = accelerator.prepare(model, optimizer, loader)
        accelerator.save_state(str(folder / "run"))
        names = dict(zip(("model", "optimizer", "loader"), prepared, strict=True))
        return names | {"accelerator": accelerator}

    def two_batches_are_left(names: Names) -> None:
        assert len(list(names["rest_of_epoch"])) == 2

    return {"Accelerator": renewed, FRESH: fresh}, two_batches_are_left


def of_a_script(folder: Path) -> tuple[Names, Callable[[Names], None]]:
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DistributedSampler
    from torch.utils.tensorboard import SummaryWriter

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, folder / "last.pt")
    names = {
        "DistributedDataParallel": DistributedDataParallel,
        "DistributedSampler": DistributedSampler,
        "writer": SummaryWriter(str(folder / "board")),
        "model": model,
        "optimizer": optimizer,
    }
    return names, lambda names: None


ENGINES = {
    "lightning-hydra-template": of_the_template,
    "Lightning": of_lightning,
    "Trainer": of_trainer,
    "Accelerate": of_accelerate,
    "a script": of_a_script,
}


def main() -> None:
    snippets: list[str] = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # Lightning writes into the current one
        own, check = ENGINES[sys.argv[1]](Path(folder))
        names = shared(Path(folder)) | own
        for snippet in snippets:
            # A snippet may make its own trainer; those that follow use the first one.
            scope = names | names.get(FRESH, dict)()
            exec(compile(snippet, sys.argv[1], "exec"), scope)
            kept = ("training_step", "validation_step", "configure_optimizers", "compute_metrics")
            kept += ("best", "rest_of_epoch", "study")
            names |= {name: scope[name] for name in kept if name in scope}
        check(names)


if __name__ == "__main__":
    main()
