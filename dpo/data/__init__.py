"""From a file to batches of token ids.

Read the files in the order of the data: sources.py finds rows, rows.py tells prompt from responses, chat.py renders
conversations, examples.py makes token ids, batches.py puts them in order. Knows no model. Imports settings and system.
"""
