"""A benchmark whose rows succeed, fail, hang or end the process, for tests of `RowRunner`."""

import os
import time


def measure_row(implementation: str, does: str) -> dict:
    """Returns a row, unless `does` is "fail", "hang" or "end"."""
    if does == "fail":
        raise ValueError(f"{implementation} can't\ndo this")
    if does == "hang":
        time.sleep(600)
    if does == "end":
        os._exit(7)
    print("output of a library")
    return {"answer": implementation, "process": os.getpid()}
