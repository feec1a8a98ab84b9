"""The engine: everything between a preference pair and an updated policy.

Eight packages, from top to bottom: reporting, training, runs, distributed, model, data, settings, system. A package
imports from itself and from packages below it, never from the root or tools/. tests/test_structure.py checks this.
"""
