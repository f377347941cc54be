"""Totals, precision and memory of a step.

Public, by module; all else is private to this folder.

buffers: Buffers, caches
calls: call, is_out_of_memory, say_if_out_of_memory
capture: attributes_of, differing, Eager, Graphs, LEAST_STEPS, same
exact: BinaryAUROC, ClassCounts, ExactR2, MulticlassAUROC, MultilabelAUROC, Seen, TokenSums
extra: check, fresh, rehearse, update
flops: peak_of, peak_of_card
memory: keep_freed_memory
precision: at_least_float32, autocast, LossScale, widest
scheduler_adapter: adapts, refuse_metric, SchedulerAdapter
totals: COUNTED, either_is_not_finite, EXAMPLES, gradient_norm, LOSS, numbers, ratio, scalar, SCORE,
    Skipped, sum_dtype, times, Totals, WEIGHT, weighted, without_waiting
unsaved: Unsaved
"""
