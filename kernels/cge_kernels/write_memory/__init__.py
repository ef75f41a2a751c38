"""write_memory_: the moving average of a batch's stripe features in the memory, in place."""
