"""revise_logits and revise_logits_one_pass: given logits times the weights from the cosines to the memory."""
