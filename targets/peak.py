"""How fast this machine can multiply and add at most, measured: what the speed of kernels is a share of."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import tvm
from tvm.tirx import PrimFunc, decl_buffer

from onnxslim.targets._tvm import config_threads, resolve_target, tvm_target
from onnxslim.targets.catalogue import find_target
from onnxslim.targets.emit import function, index, load_of, local, loop, parallel, seq, store, vector
from onnxslim.targets.machine import Machine

__all__ = ["peak_flops"]

# As many sums as hide the latency of an instruction that adds to one of them, on two units, within 16 registers.
_SUMS = 12
_STEPS = 200_000
_RUNS = 20


@functools.cache
def peak_flops(threads: int) -> float:
    """Floating-point operations a second, in float32, that ``threads`` cores reach on numbers in registers.

    The fastest of several runs counts, as a kernel's time is compared with what the machine can do, not with what it
    does while another program runs.
    """
    target = resolve_target(find_target("native"))
    machine = Machine.of(target)
    made = tvm_target(target)
    module = tvm.IRModule({"peak": _loop(machine.lanes(), threads).with_attr("global_symbol", "peak")})
    run = tvm.compile(module, made)["peak"]
    factor = tvm.runtime.tensor(np.full(2 * machine.lanes(), 0.5, np.float32))
    result = tvm.runtime.tensor(np.zeros((threads, _SUMS * machine.lanes()), np.float32))
    config_threads(threads)
    run(factor, result)
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run(factor, result)
        times.append(time.perf_counter() - start)
    return 2.0 * _SUMS * machine.lanes() * _STEPS * threads / min(times)


def _loop(lanes: int, threads: int) -> PrimFunc:
    """``sum = sum * factor + term`` many times over, for a few vectors of sums, on every thread."""
    given = decl_buffer((index(2 * lanes),), "float32", name="given")
    result = decl_buffer((index(threads), index(_SUMS * lanes)), "float32", name="result")

    def task(thread: Any) -> Any:
        sums, declared = local(_SUMS * lanes)

        def step(_: Any) -> Any:
            return seq(*(vector(lanes, functools.partial(add, number * lanes)) for number in range(_SUMS)))

        def add(at: int, lane: Any) -> Any:
            value = load_of(sums, lane + at) * load_of(given, lane) + load_of(given, lane + lanes)
            return store(sums, value, lane + at)

        def start(at: int, lane: Any) -> Any:
            return store(sums, load_of(given, lane), lane + at)

        def end(at: int, lane: Any) -> Any:
            return store(result, load_of(sums, lane + at), thread, lane + at)

        starts, ends = (
            [vector(lanes, functools.partial(each, number * lanes)) for number in range(_SUMS)] for each in (start, end)
        )
        return seq(declared, *starts, loop("step", _STEPS, step), *ends)

    return function([given, result], parallel([threads], task))
