# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter patches its language anew at every call of a device function; once a launch is enough.

That search through the language's names is near half of the time of small tiles. NumPy's warnings of overflow and NaN
are off, as a GPU gives none: tests look at results.
"""

import inspect

import numpy as np


def install() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    patched: set[frozenset[int]] = set()
    launch = interpreter.GridExecutor.__call__

    def new_launch(self, *args, **kwargs):
        patched.clear()
        with np.errstate(all="ignore"):
            return launch(self, *args, **kwargs)

    def languages(function) -> frozenset[int]:
        return frozenset(
            id(x) for x in function.__globals__.values() if inspect.ismodule(x) and (x is tl or x is tl.core)
        )

    def call(self, *args, **kwargs):
        if not hasattr(self, "languages"):
            self.languages = languages(self.fn)
        if self.languages not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.languages)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = new_launch
    interpreter.InterpretedFunction.__call__ = call
