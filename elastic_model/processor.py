"""What this machine's CPU can do, and which ONNX file is made for it. Loads nothing but the standard library."""

import os
import platform
from pathlib import Path

# file under onnx/ -> CPU flags of which one is needed, best first. Without VNNI, uint8 by int8 products saturate in
# int16: the AVX2 file's weights are rounded so that they cannot, which makes it right (if not fastest) on every CPU.
ONNX_FILES: dict[str, set[str]] = {
    "model_qint8_avx512_vnni": {"avx512_vnni", "avx_vnni"},
    "model_quint8_avx2": {"avx2"},
    "model_qint8_arm64": {"asimddp"},
    "model": set(),
    "model_fp16": set(),
    "model_bf16": set(),
}
CPUINFO = Path("/proc/cpuinfo")
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")  # cgroup of the first version
CPU_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def cpu_name() -> str:
    """The CPU's model as the kernel reports it, else its kind: what a measured time holds for."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """The instruction sets that the kernel reports; without /proc/cpuinfo AVX2 is taken for granted on an x86-64, the
    dot product instructions on an ARM."""
    if CPUINFO.exists():
        lines = [line for line in CPUINFO.read_text().splitlines() if line.startswith(("flags", "Features"))]
        return set(lines[0].split(":", 1)[1].split()) if lines else set()
    usual = {"x86_64": "avx2", "amd64": "avx2", "arm64": "asimddp", "aarch64": "asimddp"}
    return {usual[machine] for machine in [platform.machine().lower()] if machine in usual}


def fitting_files(flags: set[str]) -> list[str]:
    """The ONNX files for a CPU with these flags, best first; the float files fit every CPU."""
    return [file for file, needed in ONNX_FILES.items() if not needed or needed & flags]


def available_cores() -> int:
    """CPUs that this process may use: its affinity, and the container's quota where one is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else min(cores, max(1, int(quota)))


def _quota() -> float | None:
    """CPUs that the container's quota allows, in either form that the kernel states it."""
    if CPU_MAX.exists():
        quota, period = CPU_MAX.read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    if CPU_QUOTA.exists() and CPU_PERIOD.exists():
        allowed = int(CPU_QUOTA.read_text())
        return None if allowed < 0 else allowed / int(CPU_PERIOD.read_text())
    return None
