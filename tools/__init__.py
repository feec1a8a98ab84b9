"""Programs that drive or read runs: python -m tools.NAME; docs/code.md lists them.

train.py calls dry_run.py and inspection.py for dry_run=true and inspect=N. Tools import the root and the engine; the
engine imports no tool.
"""
