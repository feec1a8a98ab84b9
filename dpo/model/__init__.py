"""From a batch of token ids to the log-probabilities of its responses, and to samples.

Read logps.py first: every forward pass of policy and reference goes through its `ResponseLogps`. packing.py packs
examples into rows, and attention.py keeps them apart. Knows neither ranks nor run directories. Imports data, settings
and system.
"""
