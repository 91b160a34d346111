"""Shifts the wall clock of a Python process by what a file says, as a bad clock of a machine does.

Python imports this module at start because its directory is on PYTHONPATH. The file, which
`TUNESMITH_TEST_CLOCK` names, holds a double, in seconds, and may change at any time. Monotonic
clocks stay as they are, as they do on such a machine.
"""

import ctypes
import datetime
import functools
import gc
import mmap
import os
import struct
import time


def _shift(path: str) -> None:
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)

    def offset() -> float:
        return float(struct.unpack_from("<d", memory)[0])

    real_time, real_time_ns = time.time, time.time_ns
    time.time = lambda: real_time() + offset()
    time.time_ns = lambda: real_time_ns() + int(offset() * 1e9)
    for name in ("localtime", "gmtime", "ctime"):
        real = getattr(time, name)
        setattr(time, name, functools.partial(_at, real))

    real_now, real_utcnow = datetime.datetime.now, datetime.datetime.utcnow

    def now(_: type, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return real_now(tz) + datetime.timedelta(seconds=offset())

    def utcnow(_: type) -> datetime.datetime:
        return real_utcnow() + datetime.timedelta(seconds=offset())

    # The class must stay the same object, since libraries look values up by their class; and the
    # members of a class written in C can be changed behind its proxy only.
    members = gc.get_referents(datetime.datetime.__dict__)[0]
    members["now"], members["utcnow"] = classmethod(now), classmethod(utcnow)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime.datetime))


def _at(real: object, seconds: float | None = None) -> object:
    return real(time.time() if seconds is None else seconds)  # type: ignore[operator]


if "TUNESMITH_TEST_CLOCK" in os.environ:
    _shift(os.environ["TUNESMITH_TEST_CLOCK"])
