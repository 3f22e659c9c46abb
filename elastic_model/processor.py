"""What this machine's CPU can do, and which ONNX file is made for it. Loads nothing but the standard library."""

import os
import platform
from pathlib import Path

# file under onnx/ -> CPU flags of which one is needed, best first. Without VNNI, uint8 by int8 products saturate in
# int16: the AVX2 file's weights are rounded so that they cannot, which makes it right (if not fastest) on every CPU.
ONNX_FILES: dict[str, set[str]] = {
    "model_qint8_avx512_vnni": {"avx512_vnni", "avx_vnni"},
    "model_quint8_avx2": {"avx2"},
    "model": set(),
}
CPUINFO = Path("/proc/cpuinfo")
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def cpu_flags() -> set[str]:
    """The instruction sets that the kernel reports; AVX2 is taken for granted on an x86-64 without /proc/cpuinfo."""
    if CPUINFO.exists():
        lines = [line for line in CPUINFO.read_text().splitlines() if line.startswith(("flags", "Features"))]
        return set(lines[0].split(":", 1)[1].split()) if lines else set()
    return {"avx2"} if platform.machine().lower() in ("x86_64", "amd64") else set()


def fitting_files(flags: set[str]) -> list[str]:
    """The ONNX files for a CPU with these flags, best first; the float32 file fits every CPU."""
    return [file for file, needed in ONNX_FILES.items() if not needed or needed & flags]


def available_cores() -> int:
    """CPUs that this process may use: its affinity, and the container's quota where one is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if CPU_MAX.exists():
        quota, period = CPU_MAX.read_text().split()[:2]
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
