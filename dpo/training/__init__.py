"""What the training loop and the losses are made of: objectives, references, optimizers, schedules, token budgets.

Read objectives.py first: the base classes of losses.py, from log-probabilities to one loss per example. references.py
tells where the reference's log-probabilities come from. The loop itself is trainers.py. Imports every package below:
runs, distributed, model, data, settings and system.
"""
