"""Proves on the user's machine what a run promises. Read checks.py first.

plain.py and formulas.py are what runs are compared with; they import nothing of this project.
"""
