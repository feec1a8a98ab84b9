"""What a command may say: its settings, their limits, their help, and an answer to each name that does not exist.

Read schema.py first: a valid config as typed, frozen models. Nothing here imports torch, so that help and mistyped
commands are answered at once. Imports system alone.
"""
