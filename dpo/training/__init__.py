"""Building blocks of the training loop and the losses: objectives, references, optimizers, schedules, token budgets.

Read objectives.py first: the base classes of losses.py, from log-probabilities to one loss per example. references.py
computes or looks up the reference's log-probabilities. The loop itself is in trainers.py. Imports every package below:
runs, distributed, model, data, settings and system.
"""
