"""On-policy rounds: sample, score, pair, train. Read loop.py first."""
