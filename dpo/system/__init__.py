"""What the engine needs of the machine: console, errors, files, devices, network, signals, state in memory.

Read errors.py first: how a failure becomes one line and an exit code. This is the lowest package. It knows neither
settings nor models, and imports no other package of the engine.
"""
