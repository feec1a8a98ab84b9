"""One training by several processes: starting them, what they agree on, how they share a model.

Read ranks.py first: all that the trainer asks of other processes, and what it gets where there are none. sharding.py
and tensor_parallel.py split a model. Imports model, data, settings and system.
"""
