"""Measures the converted model and says how sure each figure is.

Bits per byte beside baselines, tasks, agreement of trained, reloaded and exported weights, and samples. Figures come
with 95 % intervals, on the same held-out tokens for every model that is compared, and finished runs are compared item
by item. Nothing here executes generated code, or decides whether a figure is good; nothing downloads but the tasks of
the Hub that `evaluate.harness` names. The stage fails only when trained, reloaded and exported model disagree.
"""
