"""Imported first, before what takes long: no garbage is looked for until `begin`, and never in what is there by then.

A collection looks through all that has been imported; in a rank, which was forked with it, it would copy its pages.
"""

import gc
import os


def begin() -> None:
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


gc.disable()
os.register_at_fork(after_in_child=begin)
