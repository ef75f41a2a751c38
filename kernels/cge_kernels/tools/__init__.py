"""Compiles every kernel for GPUs that need not be there: python -m cge_kernels.tools.compile --help"""
