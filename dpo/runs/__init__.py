"""What a run leaves on disk: its directory, its checkpoints, the exported model.

Read run_dir.py first, then checkpoints.py: how a checkpoint is written, verified, and found again. weights.py says
what a checkpoint holds of the policy. Imports distributed, model, data, settings and system.
"""
