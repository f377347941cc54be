"""One run: launched, recorded, loaded again, evaluated and predicted with.

Public, by module; all else is private to this folder.

console: console
export: exported
fault_checks: Untrained, untrained_of
find_lr: find_lr
generation: generate
inference: changed_split, draws_of, evaluate, other_draws, predict, predict_masks
launch: launch
loaded: load_run, LoadedRun, set_numerics
machine: resolve_device
model_checks: check, check_first_batch, check_forward, check_metrics, check_one_example,
    check_soft_targets, check_types, check_what_fits, described, has_lazy_parts, materialise
predictions: Glance, kind_of, Predictions
training: build
trial: open_storage, STORAGE, STUDY
weights: load_weights, warn_of_other_splits
worker: dismiss, leave, main, work_alone
"""
