"""Owns what crosses between the tests and the program under test: plain data as bytes, and calls on it.

Also sent into the sandbox, so: standard library only, language of Python 3.6, few imports. Nothing that comes from the
other side is run or trusted: bytes become exact built-in types, whose comparisons are Python's own; everything else is
a handle. Does not know what a test or a verdict is.
"""

import builtins
import errno
import posix
import resource

FULL = (errno.EFBIG, errno.ENOSPC)
CODES = {
    type(None): b"n", bool: b"?", int: b"i", float: b"f", complex: b"c", str: b"s", bytes: b"b", bytearray: b"a",
    list: b"l", tuple: b"t", dict: b"d", set: b"u", frozenset: b"z", range: b"r",
}  # fmt: skip
BUILDERS = {b"l": list, b"t": tuple, b"u": set, b"z": frozenset}
MUTABLE = (list, dict, set, bytearray)


class Broken(BaseException):
    """The other side is gone or sends what is not data. Nothing that a test catches."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Foreign(Exception):
    """Stands in for an exception of the program that is of no built-in kind."""


def encode(value, handle=None):
    """A value as bytes: by content where its type or a base of it is in CODES, else by (code, number) of `handle`."""
    parts = []
    _encode(value, parts.append, handle)
    return b"".join(parts)


def _encode(value, put, handle):
    kind = type(value)
    if kind not in CODES:
        kind = next((base for base in kind.__mro__ if base in CODES), None)
    if kind is None and vars(builtins).get(getattr(value, "__name__", None)) is value and type(value) is type:
        put(b"k%x:%s" % (len(value.__name__), value.__name__.encode()))
    elif kind is None:
        put(b"%s%x:" % handle(value))
    elif kind is int:
        put(b"i%x:" % value)  # hexadecimal: Python limits the digits of a decimal one
    elif kind in (type(None), bool, float):
        put(b"%s%s:" % (CODES[kind], kind.__repr__(value).encode()))
    elif kind in (str, bytes, bytearray):
        content = str.encode(value, "utf-8", "surrogatepass") if kind is str else kind.__getitem__(value, slice(None))
        put(b"%s%x:%s" % (CODES[kind], len(content), bytes(content)))
    elif kind is list and {int} == set(map(type, list.__iter__(value))):
        content = b",".join([b"%x" % item for item in list.__iter__(value)])
        put(b"I%x:%s" % (len(content), content))
    else:
        items = _items(value, kind)
        put(b"%s%x:" % (CODES[kind], len(items)))
        for item in items:
            _encode(item, put, handle)


def _items(value, kind):
    """The parts of a container, by its base type's own methods."""
    if kind is dict:
        return [part for pair in dict.items(value) for part in pair]
    if kind is complex:
        return [value.real, value.imag]
    if kind is range:
        return [value.start, value.stop, value.step]
    return list(kind.__iter__(value))


def decode(data, resolve=None):
    """The value of `encode`'s bytes; raises one or another exception for any others. `resolve` knows the handles."""
    value, end = _decode(data, 0, resolve)
    if end != len(data):
        raise ValueError("more than one value")
    return value


def _decode(data, at, resolve):
    code, colon = data[at : at + 1], data.index(b":", at)
    head, at = data[at + 1 : colon], colon + 1
    if code in (b"n", b"?"):
        return {b"None": None, b"True": True, b"False": False}[head], at
    if code == b"f":
        return float(head), at
    number = int(head, 16)
    if code == b"i":
        return number, at
    if code in (b"o", b"O"):
        return resolve(code, number), at
    if code in (b"s", b"b", b"a", b"k", b"I"):
        return _content(code, data[at : at + number], number), at + number
    items = []
    for _ in range(number):
        item, at = _decode(data, at, resolve)
        items.append(item)
    return _built(code, items), at


def _content(code, content, length):
    if len(content) != length:
        raise ValueError("cut off")
    if code == b"I":
        return [int(part, 16) for part in content.split(b",")]
    if code == b"k":
        return _builtin_type(content.decode())
    return content.decode("utf-8", "surrogatepass") if code == b"s" else {b"b": bytes, b"a": bytearray}[code](content)


def _builtin_type(name):
    value = vars(builtins)[name]
    if type(value) is not type or value.__name__ != name:
        raise ValueError("no type")
    return value


def _built(code, items):
    if code == b"d":
        return dict(zip(items[::2], items[1::2]))  # noqa: B905
    return {b"c": complex, b"r": range}[code](*items) if code in (b"c", b"r") else BUILDERS[code](items)


class Remote:
    """An object of the other side: what is done to it is done there. Equal to nothing but itself."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask, number):
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments, **named):
        value, after = self._ask("call", self, list(arguments), named)
        if after is not None:  # what the function did to its arguments is done to ours
            for old, new in zip([*arguments, *named.values()], after):  # noqa: B905
                _overwrite(old, new)
        return value

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._ask("setattr", self, name, value)

    def __iter__(self):
        return self._ask("iter", self)

    def __next__(self):
        return self._ask("next", self)

    def __len__(self):
        return self._ask("len", self)

    def __bool__(self):
        return self._ask("bool", self)

    def __str__(self):
        return self._ask("str", self)

    def __getitem__(self, key):
        return self._ask("getitem", self, key)


def _overwrite(old, new):
    if type(old) is not type(new) or type(old) not in MUTABLE:
        return
    if isinstance(old, (list, bytearray)):
        old[:] = new
    else:
        old.clear()
        old.update(new)


def call(function, arguments, named):
    """[what it returns, its arguments afterwards], the latter None where they are as they were."""
    given = [*arguments, *named.values()]
    mutable = any(isinstance(argument, MUTABLE) for argument in given)
    before = encode(given, _alike) if mutable else b""
    value = function(*arguments, **named)
    changed = mutable and encode(given, _alike) != before
    return [value, given if changed else None]


def _alike(value):
    return b"o", id(value)


OPERATIONS = {
    "call": call, "getattr": getattr, "setattr": setattr, "iter": iter, "next": next, "len": len, "bool": bool,
    "str": str, "getitem": lambda thing, key: thing[key],
}  # fmt: skip


class Peer:
    """One end of the two pipes. Asks, and while it waits for the answer does what the other side asks of it."""

    def __init__(self, read_fd, write_fd, operations, exports, limit=None):
        """`operations` are what the other side may ask for; `exports(value)` says which objects it may hold."""
        self.read_fd, self.write_fd, self.operations, self.exports = read_fd, write_fd, operations, exports
        self.limit, self.ours, self.numbers, self.theirs, self.broken = limit, [], {}, {}, False

    def _handle(self, value):
        if type(value) is Remote:
            return b"O", value._number
        if not self.exports(value):
            raise TypeError(f"a {type(value).__name__} can not be handed to the program")
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.ours)
            self.ours.append(value)
        return b"o", self.numbers[id(value)]

    def own(self, value):
        """The value, if the other side has it from here; else TypeError."""
        if not any(value is each for each in self.ours):
            raise TypeError("never handed over")
        return value

    def _resolve(self, code, number):
        if code == b"O":
            return self.ours[number]
        return self.theirs.setdefault(number, Remote(self.ask, number))

    def send(self, *message):
        """Write one message. Raises Broken where nobody reads it."""
        content = encode(message, self._handle)
        content = memoryview(len(content).to_bytes(8, "big") + content)
        try:
            while content:
                content = content[posix.write(self.write_fd, content) :]
        except OSError:
            self._break("runtime_error", "ended before its tests were done")

    def receive(self):
        """The other side's next message. Raises Broken where there is none, or where it is too long or no data."""
        length = int.from_bytes(self._read(8), "big")
        if self.limit and length > self.limit:
            self._break("output_limit", f"answered more than {self.limit >> 20} MB at once")
        try:
            kind, *rest = decode(self._read(length), self._resolve)
        except MemoryError:
            self._break("memory_limit", "answered more than the checker can hold")
        except Exception as error:
            self._break("runtime_error", f"answered what is not data: {type(error).__name__}")
        return kind, rest

    def _read(self, length):
        parts = []
        while length:
            part = posix.read(self.read_fd, min(length, 1 << 20))
            if not part:
                self._break("runtime_error", "ended before its tests were done")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _break(self, status, text):
        self.broken = Broken(status, text)
        raise self.broken

    def ask(self, operation, *arguments):
        """What the other side makes of it; raises a stand-in for what it raises."""
        self.send("ask", operation, arguments)
        while True:
            kind, rest = self.receive()
            if kind == "value" and len(rest) == 1:
                return rest[0]
            if kind == "error" and len(rest) == 3:
                raise stand_in(*rest, at_end=operation == "next")
            if kind != "ask" or len(rest) != 2:
                self._break("runtime_error", "answered what is no answer")
            self.answer(*rest)

    def answer(self, operation, arguments):
        """Do what was asked and send the value or the failure."""
        try:
            self.send("value", self.operations[operation](*arguments))
        except Broken:
            raise
        except BaseException as error:
            self.send("error", *failure_of(error))


def failure_of(error):
    """[status, name of the nearest built-in exception, text], with the spare memory released if it was that."""
    kind = next(base for base in type(error).__mro__ if vars(builtins).get(base.__name__) is base)
    status = "output_limit" if kind is OSError and error.errno in FULL else "runtime_error"
    if kind is MemoryError:
        status, (_, hard) = "memory_limit", resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return [status, kind.__name__, f"{type(error).__name__}: {str(error)[:200]}"]


def stand_in(status, name, text, at_end=False):
    """An exception like the other side's, with its status. StopIteration is one only `at_end` of an iteration."""
    kind = vars(builtins).get(str(name), Foreign)
    try:
        error = kind(text) if issubclass(kind, BaseException) else Foreign(text)
    except TypeError:  # one that takes more than a text
        error = Foreign(text)
    if isinstance(error, StopIteration) and not at_end:
        error = RuntimeError(text)
    error.status = status if status in ("memory_limit", "output_limit") else "runtime_error"
    return error
