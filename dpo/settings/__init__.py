"""What a command may say: its settings, which values they take, their help, and hints on names that do not exist.

Read schema.py first: a valid config as typed, frozen models. Nothing here imports torch, so that help and mistyped
commands are answered at once. Imports only system.
"""
