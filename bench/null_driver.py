"""A CUDA driver that does nothing, so that Triton's launcher runs, and can be timed, where there is no GPU.

Kernels are compiled for an H100 and launched by Triton's own C code with the pointers of CPU tensors; what it calls,
a stub of libcuda compiled here, answers that all went well. Needs a C compiler, as Triton does.
"""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

import cge_kernels
from cge_kernels.common.device_functions import INTERPRETED
from cge_kernels.tools.gpus import HARDWARE

# Functions whose answer is looked at; all others return 0, success.
STUB = """
#include <stdint.h>
int cuPointerGetAttribute(uint64_t *data, int attribute, uint64_t pointer) { *data = pointer; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the null driver"; return 0; }
"""
OTHERS = [
    *("cuCtxGetDevice", "cuCtxGetLimit", "cuCtxSetCurrent", "cuCtxSetLimit", "cuDeviceGet", "cuDeviceGetCount"),
    *("cuDevicePrimaryCtxRetain", "cuDriverGetVersion", "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuInit"),
    *("cuLaunchKernelEx", "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload", "cuOccupancyMaxActiveClusters"),
    *("cuPointerGetAttributes", "cuStreamIsCapturing", "cuTensorMapEncodeIm2col", "cuTensorMapEncodeTiled"),
]


@contextmanager
def null_driver() -> Iterator[None]:
    """Inside, the project's kernels on CPU tensors are launched as on an H100, and compute nothing.

    Triton's driver stays replaced in this process.

    Raises:
        RuntimeError: there is no C compiler, or kernels are interpreted.
    """
    if INTERPRETED.value:
        raise RuntimeError("TRITON_INTERPRET: must not be set, since interpreted kernels are not launched, got 1")
    with tempfile.TemporaryDirectory(prefix="null-driver-") as folder:
        os.environ["TRITON_LIBCUDA_PATH"] = str(build(Path(folder)))
        triton.runtime.driver.set_active(driver())
        with cge_kernels.backend("triton"), cge_kernels.launching(None, HARDWARE["sm_90"].target):
            yield


def build(folder: Path) -> Path:
    """Writes libcuda.so.1 into the folder, and loads it."""
    source, library = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text(STUB + "".join(f"int {name}() {{ return 0; }}\n" for name in OTHERS))
    command = [
        os.environ.get("CC", "cc"),
        "-shared",
        "-fPIC",
        "-w",
        f"-Wl,-soname,{library.name}",
        "-o",
        library,
        source,
    ]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"the null driver needs a C compiler: {error}") from error
    (folder / "libcuda.so").symlink_to(library)  # as Triton before 3.5 links it
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return folder


def driver():
    """Triton's driver for CUDA, without torch's."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class NullDriver(CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

        def get_current_device(self):
            return 0

        def set_current_device(self, device):
            pass

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    return NullDriver()
