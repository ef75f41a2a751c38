"""Looks into trained networks: each analysis is a function that writes a picture and a table of the same numbers.

It raises UserError if a checkpoint lacks what it needs or does not fit the data. Checkpoints' labels must differ.
"""
