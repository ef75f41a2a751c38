"""The GPUs that the kernels are compiled for, with the limits that decide how many programs a multiprocessor holds.

A program is a thread block (workgroup), a multiprocessor an SM, a CU, or on RDNA a WGP, as the driver counts it. All of
these share their registers and warps out over four partitions (SIMDs).

Sources. NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and the tuning guides
(from sm_80 on, CUDA keeps 1 KB of shared memory for itself in each program). AMD: the ISA documents of CDNA2, CDNA3 and
RDNA3 and LLVM's AMDGPUBaseInfo.cpp (allocation granules; a CU has 16 barriers, a WGP 32).
"""

from dataclasses import dataclass

from cge_kernels.common.launch import Target

PARTITIONS = 4
KB = 1024


@dataclass(frozen=True)
class Hardware:
    """A target on a typical GPU, and what one multiprocessor of it holds.

    warps, registers: of one partition, registers for each lane of a warp. register_unit, shared_unit: what allocations
    are rounded up to. shared_reserved: bytes that each program uses beside its own. programs: resident ones.
    compile_only: Triton compiles for it, but without tensor cores; its spills are shown and forgiven.
    """

    target: Target
    gpu: str
    programs: int
    warps: int
    shared_bytes: int
    registers: int = 512
    register_unit: int = 8
    shared_unit: int = 128
    shared_reserved: int = KB
    compile_only: bool = False

    def occupancy(self, registers: int, shared: int, num_warps: int) -> tuple[int, str]:
        """Programs that a multiprocessor holds, and what limits them (the first of these that does: warps,
        programs, registers, shared).

        registers: of a thread; shared: bytes of a program.
        """
        registers_of_warp = round_up(max(registers, 1), self.register_unit)
        shared_of_program = round_up(shared + self.shared_reserved, self.shared_unit)
        limits = {
            "warps": PARTITIONS * self.warps // num_warps,
            "programs": self.programs,
            "registers": PARTITIONS * (self.registers // registers_of_warp) // num_warps,
            "shared": self.shared_bytes // max(shared_of_program, 1),
        }
        # What AMD counts are barriers, which a program of one warp does without.
        if self.target.backend == "hip" and num_warps == 1:
            del limits["programs"]
        limit = min(limits, key=limits.get)
        return limits[limit], limit


def cuda(arch: int, gpu: str, multiprocessors: int, programs: int, warps: int, shared_kb: int, **others) -> Hardware:
    """An NVIDIA GPU. shared_kb: of a multiprocessor."""
    reserved = others.get("shared_reserved", KB)
    target = Target("cuda", arch, 32, multiprocessors, shared_bytes=shared_kb * KB - reserved)
    return Hardware(target, gpu, programs, warps, shared_kb * KB, **others)


def hip(
    arch: str, gpu: str, multiprocessors: int, programs: int, warp_size: int, warps: int,
    shared_kb: int = 64, shared_unit: int = 512, **others,
) -> Hardware:  # fmt: skip
    """An AMD GPU, where a program may use 64 KB of shared memory (LDS). shared_kb: of a multiprocessor."""
    target = Target("hip", arch, warp_size, multiprocessors, shared_bytes=64 * KB)
    return Hardware(target, gpu, programs, warps, shared_kb * KB, shared_unit=shared_unit, shared_reserved=0, **others)


HARDWARE = {
    hardware.target.family: hardware
    for hardware in (
        cuda(75, "T4", 40, 16, 8, 64, shared_unit=256, shared_reserved=0, compile_only=True),
        cuda(80, "A100", 108, 32, 16, 164),
        cuda(86, "RTX 3090", 82, 16, 12, 100),
        cuda(89, "RTX 4090", 128, 24, 12, 100),
        cuda(90, "H100", 132, 32, 16, 228),
        cuda(100, "B200", 148, 32, 16, 228),
        cuda(120, "RTX 5090", 170, 24, 12, 100),
        hip("gfx90a", "MI250X (one die)", 110, 16, 64, 8),
        hip("gfx942", "MI300X", 304, 16, 64, 8),
        hip("gfx1100", "RX 7900 XTX", 48, 32, 32, 16, registers=1536, register_unit=24, shared_kb=128, shared_unit=KB),
    )
}


def round_up(number: int, unit: int) -> int:
    """The smallest multiple of a unit that is not below a number."""
    return -(-number // unit) * unit
