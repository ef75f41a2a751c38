"""Looks into trained networks: each analysis is a function that writes a picture and a table of the same numbers."""
