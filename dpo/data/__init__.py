"""From a file to batches of token ids.

Read the files in the order of the data: sources.py opens tables, rows.py separates prompt and responses, chat.py
renders conversations, examples.py makes token ids, row_index.py chooses the rows to train on, batches.py orders and
batches them. Knows no model. Imports settings and system.
"""
