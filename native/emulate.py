"""Run a program on an emulated AVX-512 processor (a Sapphire Rapids), for machines that are none.

    pip install bochscpu-python
    cmake -S . -B build/selftest -DMIDL_SELFTEST=ON && cmake --build build/selftest
    python native/emulate.py build/selftest/native/selftest avx512 avx512bf16

The program is a static x86-64 Linux executable at fixed addresses with one thread. It runs on the CPU of the Bochs
emulator at processor level: memory, the few system calls that such a program makes, no devices. Needs a C compiler.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAGE, LARGE_PAGE = 1 << 12, 1 << 21
MEMORY = 256 << 20
# Physical addresses, which are the virtual ones too.
SYSCALL_TRAP, STACK, HEAP, PAGE_TABLES = 0x1000, 128 << 20, 132 << 20, 256 << 20
END = PAGE_TABLES + LARGE_PAGE

# The package fixes the processor model to one without BF16 instructions and, up to version 0.4.0, wants names of a C
# library that is newer than its wheel claims.
SHIM = r"""
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
void *_Z28create_sapphire_rapids_cpuidP8BX_CPU_C(void *cpu);
void *_Z23create_corei3_cnl_cpuidP8BX_CPU_C(void *cpu) { return _Z28create_sapphire_rapids_cpuidP8BX_CPU_C(cpu); }
unsigned long long __isoc23_strtoull(const char *text, char **end, int base) { return strtoull(text, end, base); }
int __isoc23_sscanf(const char *text, const char *format, ...) {
  va_list values;
  va_start(values, format);
  const int count = vsscanf(text, format, values);
  va_end(values);
  return count;
}
"""


def load_with_shim() -> None:
    """Start this script anew with the shim preloaded."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "shim.c"), Path(folder, "shim.so")
        source.write_text(SHIM)
        subprocess.run(["cc", "-shared", "-fPIC", "-w", "-Wl,-z,lazy", source, "-o", library], check=True)
        run = subprocess.run([sys.executable, *sys.argv], env={**os.environ, "LD_PRELOAD": str(library)}, check=False)
    sys.exit(run.returncode)


class Machine:
    """Memory, and the processor on it."""

    def __init__(self) -> None:
        sys.setdlopenflags(os.RTLD_GLOBAL | os.RTLD_LAZY)
        import bochscpu
        import bochscpu.cpu
        import bochscpu.memory

        self.bochs: Any = bochscpu
        self.memory = mmap.mmap(-1, END)
        host = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for address in range(0, END, PAGE):
            bochscpu.memory.page_insert(address, host + address)
        level4, level3, level2 = (PAGE_TABLES + i * PAGE for i in range(3))
        struct.pack_into("<Q", self.memory, level4, level3 | 7)
        struct.pack_into("<Q", self.memory, level3, level2 | 7)
        for i in range(MEMORY // LARGE_PAGE):
            struct.pack_into("<Q", self.memory, level2 + 8 * i, i * LARGE_PAGE | 0x87)
        self.memory[SYSCALL_TRAP] = 0xF4  # hlt

        self.session = bochscpu.Session()
        self.session.missing_page_handler = self._missing_page
        self.hook = bochscpu.Hook()
        self.hook.hlt = lambda session, cpu: session.stop()
        self.hook.exception = self._exception
        self.fault: str | None = None

    def _missing_page(self, address: int) -> None:
        raise SystemExit(f"emulate: no memory at {address:#x}")

    def _exception(self, session: Any, cpu: int, vector: int, code: int) -> None:
        self.fault = f"emulate: exception {vector}, code {code}, at {session.cpu.state.rip:#x}"
        session.stop()

    def segment(self, selector: int, attributes: int, base: int = 0) -> Any:
        """Return a present segment without a limit."""
        s = self.bochs.Segment()
        s.selector, s.attr, s.base, s.limit, s.present = selector, attributes, base, 0xFFFFFFFF, True
        return s

    def flat_segments(self, state: Any) -> None:
        """Set flat segments of 64-bit code and of data, in the kernel's ring."""
        state.cs = self.segment(8, 0xA09B)
        state.ss = self.segment(16, 0xC093)

    def start(self, entry: int, stack: int) -> None:
        """Set the processor to 64-bit mode, at ``entry``."""
        state = self.bochs.State()
        self.bochs.cpu.set_long_mode(state)
        state.cr0, state.cr3, state.cr4 = 0x80010033, PAGE_TABLES, 0x40630  # paging, SSE exceptions and XSAVE
        state.xcr0 = 0xE7  # x87, SSE, AVX and the three parts of AVX-512
        state.efer = 0xD01  # long mode, system calls, no-execute
        self.flat_segments(state)
        for name in ("ds", "es", "fs", "gs"):
            setattr(state, name, self.segment(16, 0xC093))
        state.star, state.lstar, state.sfmask = 8 << 32, SYSCALL_TRAP, 0
        state.rip, state.rsp, state.rflags = entry, stack, 2
        state.mxcsr, state.mxcsr_mask, state.fpcw = 0x1F80, 0xFFFF, 0x37F
        self.session.cpu.state = state

    def run_to_system_call(self) -> Any:
        """Return the state of the processor at the next system call."""
        self.session.run([self.hook])
        if self.fault:
            raise SystemExit(self.fault)
        return self.session.cpu.state

    def return_from_system_call(self, state: Any, result: int) -> None:
        """Do what the instruction SYSRET would do, with ``result`` in RAX."""
        state.rax, state.rip, state.rflags = result & (2**64 - 1), state.rcx, state.r11
        self.flat_segments(state)
        self.session.cpu.state = state


class Program:
    """A static executable, its arguments and the state that its kernel would keep."""

    def __init__(self, machine: Machine, arguments: list[str]) -> None:
        self.machine, self.memory = machine, machine.memory
        data = Path(arguments[0]).read_bytes()
        entry, headers = struct.unpack_from("<QQ", data, 24)
        header_size, header_count = struct.unpack_from("<HH", data, 54)
        image, self.end = 0, 0
        for i in range(header_count):
            kind, _, offset, address, _, size, memory_size, _ = struct.unpack_from(
                "<IIQQQQQQ", data, headers + i * header_size
            )
            if kind == 1:
                self.memory[address : address + size] = data[offset : offset + size]
                image = image or address - offset
                self.end = max(self.end, address + memory_size)
        self.end = -(-self.end // PAGE) * PAGE
        self.break_, self.heap = self.end, HEAP
        random = STACK - 16
        self.memory[random:STACK] = os.urandom(16)
        top, pointers = random, []
        for argument in arguments:
            text = argument.encode() + b"\0"
            top -= len(text)
            self.memory[top : top + len(text)] = text
            pointers.append(top)
        # Auxiliary vector: program headers and their size and number, page size, entry, random bytes, end.
        auxiliary = (3, image + headers, 4, header_size, 5, header_count, 6, PAGE, 9, entry, 23, 0, 25, random, 0, 0)
        words = [len(pointers), *pointers, 0, 0, *auxiliary]
        top = (top - 8 * len(words)) // 64 * 64
        struct.pack_into(f"<{len(words)}Q", self.memory, top, *words)
        machine.start(entry, top)

    def run(self) -> int:
        """Run to the end and return the exit status."""
        while True:
            state = self.machine.run_to_system_call()
            if state.rax in (60, 231):  # exit, exit_group
                return int(state.rdi) & 255
            self.machine.return_from_system_call(state, self.system_call(state))

    def system_call(self, state: Any) -> int:
        """Return what Linux would return, as far as the C library's start and output need it."""
        a, b, c = int(state.rdi), int(state.rsi), int(state.rdx)
        match int(state.rax):
            case 1:  # write
                return os.write(a, self.memory[b : b + c])
            case 9:  # mmap
                at, self.heap = self.heap, self.heap + -(-b // PAGE) * PAGE
                return at if self.heap <= MEMORY else -12
            case 12:  # brk
                self.break_ = a if self.end <= a < STACK // 2 else self.break_
                return self.break_
            case 158 if a == 0x1002:  # arch_prctl, thread-local storage
                state.fs = self.machine.segment(16, 0xC093, base=b)
                return 0
            case 228:  # clock_gettime
                struct.pack_into("<QQ", self.memory, b, *divmod(time.monotonic_ns(), 10**9))
                return 0
            case 318:  # getrandom
                self.memory[a : a + b] = os.urandom(b)
                return b
            case 10 | 11 | 13 | 14 | 218 | 273 | 334:  # mprotect, munmap, signals, thread setup
                return 0
            case _:
                return -38  # not implemented


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    if "shim.so" not in os.environ.get("LD_PRELOAD", ""):
        load_with_shim()
    os.environ.pop("LD_PRELOAD")
    status = Program(Machine(), sys.argv[1:]).run()
    os._exit(status)  # the package complains of its own leaks otherwise
