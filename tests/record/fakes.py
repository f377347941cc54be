"""Run folders as a training run leaves them, made in milliseconds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from regrow.record.records import Lock, set_status, write_json, write_text

CLASSES = [str(digit) for digit in range(10)]


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def metrics(epochs: int, steps_per_epoch: int, speed: float, score: str) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    total = epochs * steps_per_epoch
    for epoch in range(epochs):
        for step in range(epoch * steps_per_epoch + 1, (epoch + 1) * steps_per_epoch + 1):
            if step % 5 == 0:
                x = step / total
                noise = 0.15 * math.sin(12.9898 * step) * math.exp(-x)
                lines.append(
                    {
                        "step": step,
                        "epoch": epoch,
                        "train/loss": 0.05 + 2.2 * math.exp(-speed * x) + noise,
                        "train/lr": 0.001 * 0.5 * (1 + math.cos(math.pi * x)),
                        "train/grad_norm": 1.5 * math.exp(-x) + abs(noise),
                        "time/examples_per_second": 21000.0 + 900 * noise,
                        "time/waiting_for_data": 0.03 + 0.01 * noise,
                        "time/mfu": 0.174 + 0.01 * noise,
                    }
                )
        x = (epoch + 1) / epochs
        good = 0.985 - 0.88 * math.exp(-speed * x)
        lines.append(
            {
                "step": (epoch + 1) * steps_per_epoch,
                "epoch": epoch,
                "train/epoch_loss": 0.05 + 2.1 * math.exp(-speed * x),
                f"train/epoch_{score}": good + 0.01,
                "val/loss": 0.09 + 2.1 * math.exp(-speed * x) + 0.03 * x,
                f"val/{score}": good,
                "val/f1": good - 0.004,
                "val/auroc": min(1.0, good + 0.012),
            }
        )
    return lines


def make_run(
    folder: Path,
    *,
    epochs: int = 12,
    steps_per_epoch: int = 20,
    name: str = "digits",
    lr: float = 0.001,
    optimizer: str = "adamw",
    speed: float = 5.0,
    task: str = "multiclass",
    state: str = "completed",
    seed: int = 0,
) -> Path:
    folder.mkdir(parents=True)
    score = "rmse" if task == "regression" else "accuracy"
    lines = metrics(epochs, steps_per_epoch, speed, score)
    val = {k: v for k, v in lines[-1].items() if k.startswith("val/")} if lines else {}
    test = {k.replace("val/", "test/"): v - 0.003 for k, v in val.items()}
    total = epochs * steps_per_epoch
    write_lines(folder, [*lines, {"step": total, "epoch": epochs - 1, **test}])
    config = {
        "name": name,
        "seed": seed,
        "tags": ["baseline"],
        "notes": None,
        "model": {"_target_": "lab.models.mlp.MLP", "hidden": [256, 256], "dropout": 0.1},
        "optimizer": {"_target_": f"torch.optim.{optimizer}", "lr": lr, "weight_decay": 0.01},
        "trainer": {"max_epochs": epochs, "monitor": f"val/{score}", "mode": "max"},
    }
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    write_json(
        folder / "summary.json",
        {
            "status": state,
            "steps": total,
            "epochs": epochs,
            "best": {"metric": f"val/{score}", "value": val.get(f"val/{score}"), "step": total},
            "val": val,
            "test": test,
            "weights_sha256": "9f2c" * 16,
            "seconds": 21.4,
        },
    )
    write_json(
        folder / "manifest.json",
        {
            "command": f"python scripts/train.py optimizer={optimizer} optimizer.lr={lr}",
            "folder": ".",
            "started": "2026-11-21T10:02:11+01:00",
            "git": {
                "commit": "4f1d0c9e" * 5,
                "branch": "main",
                "remote": "https://example.org/lab/project.git",
                "dirty": True,
                "untracked": [],
                "diff": "git.diff",
            },
            "code_sha256": "ab" * 32,
            "python": "3.11.7",
            "packages": {"torch": "2.15.0", "hydra-core": "1.3.8", "numpy": "2.4.6"},
            "hardware": {"host": "box", "cpu": "Some CPU @ 2 GHz", "cpus": 2, "memory_gib": 7.7},
            "environment": {"OMP_NUM_THREADS": "1"},
            "data": {"train": {"examples": 1257, "sha256": "cd" * 32}},
            "seeds": {"seed": seed},
        },
    )
    (folder / "plots").mkdir()
    write_json(folder / "plots" / "test.json", details(task))
    with Lock(folder):
        set_status(folder, state, step=total, pids=[1234])  # type: ignore[arg-type]
    return folder


def details(task: str) -> dict[str, Any]:
    if task == "regression":
        true = [25 + 3.2 * index for index in range(90)]
        return {
            "true": true,
            "predicted": [t + 22 * math.sin(7.7 * i) for i, t in enumerate(true)],
        }
    if task == "multilabel":
        names = ["even", "prime", "above four", "has a loop"]
        return {"confusion_matrix": [[[90, 3], [5, 82]]] * 4, "class_names": names}
    matrix = [[36 if row == column else 0 for column in range(10)] for row in range(10)]
    matrix[8][1], matrix[9][3], matrix[3][8] = 3, 1, 2
    return {"confusion_matrix": matrix, "class_names": CLASSES}
