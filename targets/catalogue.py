"""What can be compiled for: named processors and their properties. Looking one up imports no compiler."""

from __future__ import annotations

import difflib
import platform
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer

from onnxslim.errors import TargetError
from onnxslim.runtime import usable_cores

__all__ = ["NATIVE_CPU", "TARGETS", "Target", "find_target", "host_cpu_flags", "runs_here"]

NATIVE_CPU = "native"
"""The ``mcpu`` of a target whose processor LLVM is to detect when it compiles."""

# The oldest glibc that TVM's own wheels run on (manylinux_2_28); a library linked against it runs on every newer one.
_GLIBC = "2.28"


class Target(BaseModel):
    """One processor to compile for.

    A recipe may define its own with the same fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="what a recipe and the command line call it")
    description: str
    machine: Literal["x86_64", "aarch64"] = Field(description="instruction set, as `uname -m` says it")
    tvm: dict[str, Any] = Field(description="TVM target: kind, mtriple, mcpu, mattr, num-cores")
    vector_bits: int = Field(ge=64, description="width of the widest vector register that is worth using")
    int8_dot: Literal["none", "avx512-vnni", "avx-vnni", "sdot"] = Field(
        default="none", description="instruction that multiplies bytes and adds into 32 bits"
    )
    cores: int = Field(ge=1, description="cores that one inference may use")
    l1_bytes: int = Field(ge=1024, description="level 1 data cache of one core")
    l2_bytes: int = Field(ge=1024, description="level 2 cache that one core can count on")
    link: str = Field(description="what to link for, as Zig names it, such as aarch64-linux-gnu.2.28")
    cpu_flags: frozenset[str] = Field(
        default=frozenset(), description="/proc/cpuinfo flags without which the library does not run"
    )
    runner: Literal["local", "qemu-aarch64"] = Field(
        default="local", description="what can run the library here when this machine's own processor cannot"
    )

    @field_serializer("cpu_flags")
    def _in_order(self, flags: frozenset[str]) -> list[str]:
        # A set has another order in each process, and what is written must be the same for the same target.
        return sorted(flags)

    @property
    def mcpu(self) -> str:
        """The processor in LLVM's terms."""
        return str(self.tvm.get("mcpu", "generic"))


# psABI levels; names as the kernel spells them.
_V2 = frozenset({"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"})
_V3 = _V2 | {"abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def _x86(level: str, description: str, vector_bits: int, flags: frozenset[str]) -> Target:
    return Target(
        name=f"x86-64-{level}",
        description=description,
        machine="x86_64",
        tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": f"x86-64-{level}", "num-cores": 4},
        vector_bits=vector_bits,
        cores=4,
        l1_bytes=32 << 10,
        l2_bytes=256 << 10 if level == "v2" else 1 << 20,
        link=f"x86_64-linux-gnu.{_GLIBC}",
        cpu_flags=flags,
    )


def _arm(name: str, mcpu: str, description: str, *, cores: int, l1_kib: int, l2_kib: int, dot: bool = False) -> Target:
    return Target(
        name=name,
        description=description,
        machine="aarch64",
        tvm={"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": mcpu, "mattr": ["+neon"], "num-cores": cores},
        vector_bits=128,
        int8_dot="sdot" if dot else "none",
        cores=cores,
        l1_bytes=l1_kib << 10,
        l2_bytes=l2_kib << 10,
        link=f"aarch64-linux-gnu.{_GLIBC}",
        cpu_flags=frozenset({"asimd", "asimddp", "asimdhp", "atomics"} if dot else {"asimd"}),
        runner="qemu-aarch64",
    )


_FIXED = [
    _x86("v2", "any 64-bit x86 since 2009: SSE4.2", 128, _V2),
    _x86("v3", "x86 since Haswell (2013) and Zen: AVX2 and FMA", 256, _V3),
    _x86("v4", "x86 servers since Skylake-SP (2017), and Zen 4: AVX-512", 512, _V4),
    _arm("cortex-a53", "cortex-a53", "Arm Cortex-A53: in order, NEON", cores=4, l1_kib=32, l2_kib=512),
    _arm("cortex-a72", "cortex-a72", "Arm Cortex-A72: NEON", cores=4, l1_kib=32, l2_kib=1024),
    _arm("cortex-a76", "cortex-a76", "Arm Cortex-A76: NEON, dot product", cores=4, l1_kib=64, l2_kib=512, dot=True),
    _arm("raspberry-pi-4", "cortex-a72", "Raspberry Pi 4, 64-bit Linux: 4 × A72", cores=4, l1_kib=32, l2_kib=1024),
    _arm(
        "raspberry-pi-5",
        "cortex-a76",
        "Raspberry Pi 5, 64-bit Linux: 4 × A76",
        cores=4,
        l1_kib=64,
        l2_kib=512,
        dot=True,
    ),
    _arm(
        "neoverse-n1",
        "neoverse-n1",
        "Arm Neoverse N1: Graviton 2, Ampere Altra",
        cores=4,
        l1_kib=64,
        l2_kib=1024,
        dot=True,
    ),
]


def host_cpu_flags() -> frozenset[str]:
    """What this machine's processor can do, in the words of ``/proc/cpuinfo``; empty where there is no such file."""
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _cpu_name() -> str:
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _cache_bytes(level: int, default: int) -> int:
    """Size of the first core's data or unified cache of a level, from sysfs."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if int((index / "level").read_text()) != level or (index / "type").read_text().strip() == "Instruction":
                continue
            size = (index / "size").read_text().strip()
            return int(size.rstrip("KM")) << {"K": 10, "M": 20}.get(size[-1], 0)
        except (OSError, ValueError):
            continue
    return default


def _native() -> Target:
    flags = host_cpu_flags()
    machine: Literal["x86_64", "aarch64"] = "aarch64" if platform.machine() in ("aarch64", "arm64") else "x86_64"
    cores = usable_cores()
    if machine == "aarch64":
        vector_bits, int8_dot = 128, "sdot" if "asimddp" in flags else "none"
    else:
        vector_bits = 512 if "avx512f" in flags else 256 if "avx2" in flags else 128
        int8_dot = "avx512-vnni" if "avx512_vnni" in flags else "avx-vnni" if "avx_vnni" in flags else "none"
    return Target(
        name="native",
        description=f"this machine: {_cpu_name()}, {cores} {'core' if cores == 1 else 'cores'}",
        machine=machine,
        tvm={"kind": "llvm", "mtriple": f"{machine}-linux-gnu", "mcpu": NATIVE_CPU, "num-cores": cores},
        vector_bits=vector_bits,
        int8_dot=int8_dot,  # type: ignore[arg-type]
        cores=cores,
        l1_bytes=_cache_bytes(1, 32 << 10),
        l2_bytes=_cache_bytes(2, 256 << 10),
        link=f"{machine}-linux-gnu.{_GLIBC}",
    )


TARGETS: dict[str, Target] = {target.name: target for target in [_native(), *_FIXED]}
"""Every target that has a name, in the order in which they are listed."""


def find_target(name: str) -> Target:
    """Return the target of that name.

    Raises:
        TargetError: there is none; the message lists near matches and all names.
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name.lower().replace("_", "-"), TARGETS, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise TargetError(f"target {name!r} is unknown.{hint} There are: {', '.join(TARGETS)}.")


def runs_here(target: Target) -> bool:
    """Whether this machine's own processor and system can run what is compiled for ``target``."""
    if not sys.platform.startswith("linux") or platform.machine() != target.machine:
        return False
    return target.cpu_flags <= host_cpu_flags()
