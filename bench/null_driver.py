"""A CUDA driver that does nothing, so that Triton's launcher runs, and can be timed, where there is no GPU.

Kernels are compiled for an H100 and launched by Triton's own C code with the pointers of CPU tensors; what it calls,
a stub of libcuda compiled here, answers that all went well. Needs a C compiler, as Triton does.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

# Functions whose answer is looked at; all others return 0, success.
STUB = """
#include <stdint.h>
int cuPointerGetAttribute(uint64_t *data, int attribute, uint64_t pointer) { *data = pointer; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the null driver"; return 0; }
"""
OTHERS = """
cuCtxGetDevice cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuDeviceGet cuDeviceGetCount cuDevicePrimaryCtxRetain
cuDriverGetVersion cuFuncSetAttribute cuFuncSetCacheConfig cuInit cuLaunchKernelEx cuModuleGetFunction cuModuleLoadData
cuModuleUnload cuOccupancyMaxActiveClusters cuPointerGetAttributes cuStreamIsCapturing cuTensorMapEncodeIm2col
cuTensorMapEncodeTiled
""".split()
