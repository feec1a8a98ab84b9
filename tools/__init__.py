"""Programs that drive a run or read one: python -m tools.NAME, with NAME report, compare, frontier, judges or demo.

dry_run.py and inspection.py are what train.py calls for dry_run=true and inspect=N. A tool imports the root and the
engine; the engine imports no tool.
"""
