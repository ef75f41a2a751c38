"""Evaluation: features of query and gallery, their ranking, and re-ranking."""
