"""Metrics, the diagnosis of evaluations, trackers, the HTML report, the model card.

Read metrics.py first: it turns values per example into records of metrics.jsonl. This is the highest package and may
import all others of the engine.
"""
