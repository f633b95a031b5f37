"""A benchmark whose rows answer, fail, hang or end the process: for the tests of `Runner`."""

import os
import time


def row(implementation: str, does: str) -> dict:
    if does == "fail":
        raise ValueError(f"{implementation} can't\ndo this")
    if does == "hang":
        time.sleep(600)
    if does == "end":
        os._exit(7)
    print("what a library prints")
    return {"answer": implementation, "process": os.getpid()}
