"""What the writers of kernels know of a processor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxslim.targets.catalogue import Target

__all__ = ["Machine"]

# Below this many multiply-adds, waking another thread costs more than it saves.
PARALLEL_WORK = 1 << 15


@dataclass(frozen=True)
class Machine:
    """A processor in the numbers that tiles are cut by.

    Attributes:
        vector_bits: width of a vector register.
        registers: how many there are.
        cores: how many threads one inference may use.
        l1_bytes: level 1 data cache of a core.
        l2_bytes: level 2 cache that a core can count on.
        fused_multiply_add: whether a product and a sum are one instruction.
    """

    vector_bits: int
    registers: int
    cores: int
    l1_bytes: int
    l2_bytes: int
    fused_multiply_add: bool

    @classmethod
    def of(cls, target: Target) -> Machine:
        """Of a resolved target. 16 vector registers up to AVX2, 32 with AVX-512 and on 64-bit Arm."""
        arm = target.machine == "aarch64"
        return cls(
            vector_bits=target.vector_bits,
            registers=32 if arm or target.vector_bits == 512 else 16,
            cores=target.cores,
            l1_bytes=target.l1_bytes,
            l2_bytes=target.l2_bytes,
            fused_multiply_add=arm or target.vector_bits >= 256,
        )

    def lanes(self, dtype: str = "float32") -> int:
        """How many numbers a vector holds."""
        return max(1, self.vector_bits // (8 * np.dtype(dtype).itemsize))
