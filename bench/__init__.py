"""Times, counts and predictions of the kernels and of training: python -m bench --help"""
