"""What a run leaves on disk: its directory, its checkpoints, the exported model.

Read run_dir.py first, then checkpoints.py, which writes, verifies and finds checkpoints. weights.py defines what a
checkpoint holds of the policy. Imports distributed, model, data, settings and system.
"""
