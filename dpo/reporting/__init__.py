"""What is measured and shown: metrics, the diagnosis of evaluations, trackers, the HTML page, the model card.

Read metrics.py first: how one value per example becomes a record of metrics.jsonl. This is the highest package, and
may import all others of the engine.
"""
