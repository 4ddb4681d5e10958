"""Ctrl-C and SIGTERM end the command, whatever a library makes of them.

The handler raises a KeyboardInterrupt, but that can get lost: Python drops what is raised in a
destructor or a callback from C, and some libraries catch everything and go on another way. So the
handler remembers that it was called, what was dropped is raised again, and the compiler asks at the
end of every stage and before it puts a bundle into its place.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_AGAIN_S = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# The number of the signal that came. Signals are the process's own, so this is, too.
_came: list[int] = []


class Interrupted(KeyboardInterrupt):
    """By its own name, as a plain KeyboardInterrupt that leaves a string run by exec() does harm.

    torch and dataclasses run strings. CPython then notes an unhandled interruption although someone
    catches it further up, and under `python -m` kills itself with SIGINT at the end
    (run_eval_code_obj in pythonrun.c).
    """


def came() -> int | None:
    """The number of the signal that is to end the command, once it came."""
    return _came[0] if _came else None


def check() -> None:
    """Raises Interrupted if a signal came, and whoever got the first one went on."""
    if _came:
        _ignore()
        raise Interrupted


@contextmanager
def ending_by_signal() -> Iterator[None]:
    """Within it SIGTERM ends the command as Ctrl-C does, and a second one does not disturb that.

    After an interruption both signals stay ignored: the process is about to end.
    """
    _came.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    hook = sys.unraisablehook
    previous = {number: signal.signal(number, _handle) for number in _SIGNALS}
    sys.unraisablehook = _raising_again(hook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if not _came:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - signal's
    if not _came:
        _came.append(number)
    _ignore()
    raise Interrupted


def _ignore() -> None:
    """Further signals do not disturb the clean-up."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _raising_again(
    hook: Callable[["sys.UnraisableHookArgs"], object],
) -> Callable[["sys.UnraisableHookArgs"], object]:
    """The hook, which lets no interruption be dropped."""

    def unraisable(dropped: "sys.UnraisableHookArgs") -> None:
        if _came and dropped.exc_type is Interrupted:
            signal.signal(signal.SIGINT, _handle)
            # Not from here, where it would be dropped as well.
            timer = threading.Timer(_AGAIN_S, _interrupt_main_thread)
            timer.daemon = True
            timer.start()
        else:
            hook(dropped)

    return unraisable


def _interrupt_main_thread() -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)  # a signal ends what it sleeps in, too
