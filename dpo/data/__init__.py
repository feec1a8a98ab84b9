"""From a file to batches of token ids.

Read the files in the order of the data: sources.py and formats.py (tables and their raw rows), columns.py, rows.py,
ranking.py and messages.py (a raw row becomes a prompt with responses), formatting.py, chat.py and places.py (the texts
that the model sees), examples.py (token ids), records.py and statistics.py (kept, dropped or refused), table.py,
selection.py and loader.py (the cache, and what a split takes of it), mixture.py and batches.py; then preferences.py,
for functions in DATASETS. Knows no model. Imports settings and system.
"""
