"""The monitored metric: its direction, and what a run without one cannot do.

Imports no torch: a sweep uses this before it starts its jobs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.dotted import Checked, Config
from regrow.errors import UserError

MODES = ("max", "min")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words in the names of metrics: more is better, then less is better.
_MORE = _words(
    "acc accuracy ap auc aucpr aupr auprc auroc bleu chrf concordance corrcoef correlation d2 dice "
    "dsc f f1 f2 fbeta f1score fscore hit hits iou jaccard kappa kendall map mcc matthews meteor "
    "miou mrr ndcg npv pearson ppv prauc precision psnr purity r2 r2score recall reward "
    "rocauc rouge rouge1 rouge2 rougel sensitivity similarity spearman specificity ssim success "
    "tnr tpr throughput"
)
_LESS = _words(
    "bce bpb bpc bpd brier ce cer cost crps deviance distance divergence ece eer err error errors "
    "fdr fid fnr fpr hamming hausdorff hinge kid kl latency logloss loss losses lpips mae mape "
    "mase medae mse msle nll nrmse perplexity ppl regret residual rmse rmsle rse smape wape wer "
    "xent"
)
# Words that may follow the metric.
_QUALIFIERS = _words(
    "all at avg average class ema epoch k log macro max mean median micro min per raw rate sample "
    "samples score step sum test token top total train val weighted word"
)
# Whole names whose words do not tell the direction, or tell the opposite.
_WHOLE = {
    **dict.fromkeys(
        _words(
            "exact_match explained_variance log_likelihood loglikelihood true_positive_rate "
            "true_negative_rate hit_rate win_rate hamming_score"
        ),
        "max",
    ),
    **dict.fromkeys(
        _words(
            "cross_entropy crossentropy bits_per_byte neg_log_likelihood negative_log_likelihood "
            "false_positive_rate false_negative_rate false_discovery_rate "
            # These two measure distances.
            "deep_image_structure_and_texture_similarity learned_perceptual_image_patch_similarity"
        ),
        "min",
    ),
}
# Words that reverse the direction (neg_mean_squared_error, one_minus_accuracy) or measure something
# else about the metric (drop_in_accuracy).
_TURNS = _words(
    "neg negative minus inv inverse inverted reciprocal one non not without anti lack "
    "change decrease delta diff difference drop gap increase range spread std var variance"
)
# A minus sign reverses it too: -loss, 1-accuracy, 100 - f1; but not 1-shot accuracy.
_SIGN = re.compile(r"\s*(?:1|1\.0|100)?\s*[-\u2212]\s*([a-z0-9]+)")


def by_name(metric: str) -> str | None:
    """Return max or min for a metric such as val/f1/cat, by its base name; None if unknown."""
    parts = metric.split("/")
    name = parts[1] if len(parts) > 1 else parts[0]
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # splits MeanSquaredError; IoU stays whole
    spellings = [re.findall(r"[a-z0-9]+", text.lower()) for text in (name, split)]
    for words in spellings:
        if whole := _WHOLE.get("_".join(words)):
            return whole
    known = {word for its in spellings for word in its}
    if _TURNS & known or _has_a_sign(name) or not any(map(_ends_in_a_metric, spellings)):
        return None
    found = {mode for mode, of in (("max", _MORE), ("min", _LESS)) if of & known}
    return found.pop() if len(found) == 1 else None


def _has_a_sign(name: str) -> bool:
    sign = _SIGN.match(name.lower())
    return sign is not None and sign[1] in _MORE | _LESS | _QUALIFIERS


def _ends_in_a_metric(words: list[str]) -> bool:
    """Return True for a metric's name, such as accuracy_top5 or loss_mse, not error_detection."""
    rest = itertools.dropwhile(_is_qualifier, reversed(words))
    return next(rest, "") in _MORE | _LESS


def _is_qualifier(word: str) -> bool:
    return word in _QUALIFIERS or re.fullmatch(r"(top|at|k)?\d+", word) is not None


def of_run(config: Checked) -> str | None:
    """Return the direction of a run's monitor: from the trainer, the task, or the metric's name.

    None if the run has no monitor, or only torchmetrics can tell.
    """
    trainer, task = config["trainer"], config["task"]
    monitor = trainer["monitor"]
    if trainer["mode"] is not None or monitor is None:
        return None if monitor is None else str(trainer["mode"])
    if task.get("mode") in MODES and task.get("monitor") == monitor:  # a user's own task
        return str(task["mode"])
    return by_name(monitor)


def contradiction(metric: str, mode: str) -> str | None:
    """Return a warning if a direction contradicts the metric's name, else None."""
    by_its_name = by_name(metric)
    if by_its_name in (None, mode):
        return None
    usual = "more" if by_its_name == "max" else "less"
    return f"{usual} of {metric} is usually better, and the {mode}imum is what this prefers"


def of_metrics(metrics: Any, monitor: str) -> str | None:
    """Return max or min by torchmetrics, if `metrics` holds its object under the metric's name."""
    if hasattr(metrics, "higher_is_better"):
        higher = metrics.higher_is_better(monitor)
    else:
        held = dict(getattr(metrics, "__dict__", {}))
        for value in [*held.values()]:
            if isinstance(value, Mapping):
                held |= value
        name = monitor.split("/")[1] if "/" in monitor else monitor
        higher = getattr(held.get(name), "higher_is_better", None)
    return {True: "max", False: "min"}.get(higher) if isinstance(higher, bool) else None


def refuse_without(values: Checked, why: str = "trainer.monitor=null") -> None:
    """Raise UserError for settings that need a monitor, in the config of a run without one."""
    patience = values["trainer"]["early_stopping"]["patience"]
    if patience is not None:
        raise UserError(
            f"trainer.early_stopping.patience={patience}: {why}, so nothing says when to "
            "stop. Use trainer.early_stopping.patience=null, or give the data a validation split "
            "and the run a monitor."
        )
    if str(values["scheduler"].get("_target_", "")).rpartition(".")[2] == "plateau":
        raise UserError(
            f"scheduler=plateau: {why}, so nothing says when to lower the rate. Use another "
            "scheduler, or give the data a validation split and the run a monitor."
        )


def refuse_unmeasured(key: str, metric: str, data: Checked, others: str = "") -> None:
    """Raise UserError for a metric of a set that is not measured during training.

    `others` is what else the key takes.
    """
    name, slash, _ = metric.partition("/")
    if not slash or name in ("train", "time", "test", *data["final_sets"]):
        hint = f" Did you mean val/{metric}?" if not slash else ""
        raise UserError(
            f"{key}={metric} must be a metric of a set that is measured during training, such as "
            f"val/loss{others}.{hint}"
        )


def lacks_val(source: Mapping[str, Config]) -> bool:
    """Return True if one of our data sources certainly has no validation split.

    False if only reading the data can tell.
    """
    if source.get("num_val") == 0 or ("val" in source and source["val"] is None):
        return True
    own = source.get("val_file") or Path(str(source.get("root")), "val").is_dir()
    return source.get("val_fraction") == 0 and not own
