"""Losses of logits (`classification`) and of features (`metric`)."""
