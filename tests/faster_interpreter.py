# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, several times as fast: the same operations, their types deduced once.

In `a + b` of two tiles NumPy adds for a microsecond. For fifty before that, Triton's front end works out the types of
operands and result, and promotes and broadcasts. As in a compiler, this depends on types and constants alone. So Triton
does an operation the first time that it has operands of some types, and what it asks of the interpreter's builder
(splat this, broadcast that, add) is written down, less what nothing uses; later calls with such types repeat those
requests on new operands. The builder, which holds all arithmetic, stays Triton's: test_faster_interpreter.py compares
bits.

The language is patched once a launch, not once a call of a device function. One thread launches at a time, since the
index of the running program is a global of the interpreter. NumPy's warnings of overflow and NaN are off, as a GPU
gives none: tests look at results.
"""

import functools
import inspect
import re
import threading
import warnings
from dataclasses import dataclass, field

import numpy as np

# Requests that read or write something beside their arguments: never left out, never answered from the last time.
_NOT_PURE = re.compile("load|store|atomic|gather|scatter|print|assert|assume|barrier|program|asm|extern|descriptor")


@functools.cache
def _compiled(source: str):
    return compile(source, "<requests of an operation>", "exec")


class _NotRepeatable(Exception):
    """An operation depends on more than types and constants."""


class _Kind:
    """Stands for one type in the signature of an operation; equal types share one."""

    known: dict = {}

    @classmethod
    def of(cls, t):
        try:
            return t.kind_of_faster_interpreter
        except AttributeError:
            kind = t.kind_of_faster_interpreter = cls.known.setdefault(_structure(t), cls())
            return kind


def _structure(t):
    if t.is_block():
        return "block", _structure(t.element_ty), tuple(t.shape)
    if t.is_ptr():
        return "pointer", _structure(t.element_ty), t.address_space, t.const
    return t.name


@dataclass
class _Recorder:
    """The interpreter's builder, which also writes down what it is asked for."""

    builder: object
    handle_class: type
    slots: dict[int, str] = field(default_factory=dict)  # id of a handle -> its name in the plan
    steps: list = field(default_factory=list)  # (name or names of results, request, arguments, whether it is pure)
    keep: list = field(default_factory=list)  # handles, so that ids stay theirs

    def start(self, handles):
        self.slots, self.steps, self.keep = {}, [], list(handles)
        for i, handle in enumerate(handles):
            self.slots.setdefault(id(handle), f"h[{i}]")

    def __getattr__(self, name):
        found = getattr(self.builder, name)
        if not callable(found) or not name.startswith(("create_", "get_")):
            return found

        def request(*args, **kwargs):
            result = found(*args, **kwargs)
            results = result if isinstance(result, tuple) else (result,)
            if not all(x is None or isinstance(x, self.handle_class) for x in results):
                if not name.startswith("get_"):
                    raise _NotRepeatable(name)
                return result  # a type
            self.keep.append(result)
            names = [f"t{len(self.keep)}_{i}" for i in range(len(results))]
            self.slots.update(zip(map(id, results), names, strict=True))
            arguments = [(None, x) for x in args] + list(kwargs.items())
            self.steps.append((names, isinstance(result, tuple), name, arguments, not _NOT_PURE.search(name)))
            return result

        return request


class _Plan:
    """Python source of the requests, and of the tensors made of their results."""

    def __init__(self, recorder, result, tensor_class):
        self.recorder, self.tensor_class = recorder, tensor_class
        self.constants = {"handle": recorder.handle_class, "new": tensor_class.__new__, "tensor": tensor_class}
        used = set()
        returned = self.output(result, used)
        fixed = {}  # results that are the same at each call
        shares = not any(step[2] == "create_ashr" for step in recorder.steps)  # it changes its operands' dtype
        lines = []
        for names, several, request, arguments, pure in recorder.steps:
            written, inputs = self.arguments(arguments)
            if pure and shares and all(name in fixed for name in inputs):
                fixed.update(dict.fromkeys(names))
            lines.append((names, several, request, written, inputs, pure))
        handles = {name: x for x in self.flat(recorder.keep) if (name := recorder.slots.get(id(x))) in fixed}
        body = []
        for names, several, request, written, inputs, pure in reversed(lines):
            if pure and not used.intersection(names) or all(name in fixed for name in names):
                continue
            used.update(inputs)
            left = ", ".join(names) if several else names[0]
            body.append(f"{left} = b.{request}({written})")
        for name in fixed:
            if name in used:
                handles[name].data.flags.writeable = False
                self.constants[name] = handles[name]
        code = "\n    ".join(["def replay(b, h):", *reversed(body), *self.made, f"return {returned}"])
        scope = dict(self.constants)
        exec(_compiled(code), scope)
        self.replay = scope["replay"]

    @staticmethod
    def flat(values):
        for x in values:
            if isinstance(x, tuple):
                yield from x
            else:
                yield x

    def constant(self, value):
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def arguments(self, arguments):
        """(source of the arguments, the slots in them)."""
        inputs = []

        def write(x):
            if isinstance(x, self.recorder.handle_class):
                if id(x) not in self.recorder.slots:
                    raise _NotRepeatable("a handle from elsewhere")
                inputs.append(self.recorder.slots[id(x)])
                return inputs[-1]
            if isinstance(x, (list, tuple)) and any(isinstance(y, self.recorder.handle_class) for y in x):
                return "[" + ", ".join(map(write, x)) + "]"
            return self.constant(x)

        written = ", ".join((f"{name}=" if name else "") + write(x) for name, x in arguments)
        return written, inputs

    made: list

    def output(self, result, used):
        self.made = []
        return self.value(result, used)

    def value(self, result, used):
        if type(result) is self.tensor_class:
            template = {name: x for name, x in result.__dict__.items() if name != "handle"}
            _Kind.of(result.type)
            name = f"r{len(self.made)}"
            at = "None"
            if result.handle is not None:
                if id(result.handle) not in self.recorder.slots:
                    raise _NotRepeatable("a handle from elsewhere")
                at = self.recorder.slots[id(result.handle)]
                used.add(at)
            self.made += [
                f"{name} = new(tensor)",
                f"d = {name}.__dict__",
                f"d.update({self.constant(template)})",
                f"d['handle'] = {at}",
            ]
            return name
        if type(result) is tuple:
            return "(" + "".join(self.value(x, used) + ", " for x in result) + ")"
        if result is None or type(result) in (int, bool):
            return self.constant(result)
        raise _NotRepeatable(f"a result of {type(result)}")


def install() -> None:
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    tensor, constexpr, dtype = tl.core.tensor, tl.core.constexpr, tl.core.dtype
    builder = interpreter.interpreter_builder
    recorder = _Recorder(builder, interpreter.TensorHandle)
    recording_semantic = TritonSemantic(recorder)
    recording = False

    def signature(values, key, handles):
        """Append what the operation's course depends on to `key`, and tensors' handles to `handles`."""
        for x in values:
            kind = type(x)
            if kind is tensor:
                t = x.type
                try:
                    key.append(t.kind_of_faster_interpreter)
                except AttributeError:
                    key.append(_Kind.of(t))
                handles.append(x.handle)
            elif kind is int or x is None or kind is str:
                key.append(x)
            elif kind is bool or kind is float:
                key.append((kind, repr(x)))
            elif kind is constexpr:
                key.append(constexpr)
                signature((x.value,), key, handles)
            elif kind is slice:
                key.append(slice)
                signature((x.start, x.stop, x.step), key, handles)
            elif kind is tuple or kind is list or kind is tl.core.tuple:
                key.append((kind, len(x)))
                signature(x, key, handles)
            elif isinstance(x, dtype):
                key.append((dtype, _Kind.of(x)))
            else:
                raise _NotRepeatable

    def repeated(member):
        """A builtin of the language, which repeats the requests of its first call with arguments of such types."""
        plans = {}

        def call(*args, _semantic=interpreter.interpreter_semantic, **kwargs):
            nonlocal recording
            if recording:
                return member(*args, _semantic=recording_semantic, **kwargs)
            key, handles = [], []
            try:
                signature(args, key, handles)
                if kwargs:
                    for name, x in kwargs.items():
                        key.append((name,))
                        signature((x,), key, handles)
            except _NotRepeatable:
                return member(*args, _semantic=_semantic, **kwargs)
            if len(handles) > 1 and len({id(x) for x in handles}) < len(handles):  # x * x is not any x * y
                key.append(tuple(next(i for i, y in enumerate(handles) if y is x) for x in handles))
            key = tuple(key)
            try:
                replay = plans[key]
            except KeyError:
                pass
            else:
                if replay is None:
                    return member(*args, _semantic=_semantic, **kwargs)
                return replay(builder, handles)
            recording = True
            try:
                recorder.start(handles)
                result = member(*args, _semantic=recording_semantic, **kwargs)
                plans[key] = _Plan(recorder, result, tensor).replay
                return result
            except _NotRepeatable:
                plans[key] = None
            finally:
                recording = False
            return member(*args, _semantic=_semantic, **kwargs)

        return call

    wrapped = {}

    def new_patch_attr(obj, name, member, _, scope):
        at = (obj, name, member)
        if at not in wrapped:
            wrapped[at] = repeated(member)
        scope.set_attr(obj, name, wrapped[at])

    patch_lang = interpreter._patch_lang
    changes = {}  # languages -> what patching them sets

    def languages(function) -> frozenset[int]:
        return frozenset(
            id(x) for x in function.__globals__.values() if inspect.ismodule(x) and (x is tl or x is tl.core)
        )

    def new_patch_lang(function):
        key = languages(function)
        if key not in changes:
            scope = patch_lang(function)
            changes[key] = [(obj, name, vars(obj)[name]) for obj, name, _ in scope._changes]
            return scope
        scope = interpreter._LangPatchScope()
        for change in changes[key]:
            scope.set_attr(*change)
        return scope

    patched: set[frozenset[int]] = set()
    launch = interpreter.GridExecutor.__call__
    lock = threading.RLock()

    def new_launch(self, *args, **kwargs):
        with lock, np.errstate(all="ignore"), warnings.catch_warnings():
            # Triton 3.6's interpreter, at the bounds of a loop.
            warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
            patched.clear()
            return launch(self, *args, **kwargs)

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

    get_np_dtype = interpreter._get_np_dtype

    def new_get_np_dtype(t):
        try:
            return t.np_dtype
        except AttributeError:
            t.np_dtype = get_np_dtype(t)
            return t.np_dtype

    def new_handle(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        self.__post_init__()

    interpreter._patch_attr = new_patch_attr
    interpreter._patch_lang = new_patch_lang
    interpreter._get_np_dtype = new_get_np_dtype
    interpreter.TensorHandle.__init__ = new_handle
    interpreter.GridExecutor.__call__ = new_launch
    interpreter.InterpretedFunction.__call__ = call
