"""Devices by address: this machine, a board over ssh, Android over adb, QEMU, a fleet over RPC."""

from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

from gfcompile.runtime.devices.adb import open_adb
from gfcompile.runtime.devices.base import Completed, Device
from gfcompile.runtime.devices.local import open_local
from gfcompile.runtime.devices.qemu import open_qemu
from gfcompile.runtime.devices.ssh import open_ssh
from gfcompile.runtime.errors import NoVerdictError, UserError

__all__ = ["ADDRESSES", "Completed", "Device", "open_device", "register_device"]

ADDRESSES = "local, ssh://[user@]host[:port], adb://serial, qemu:cpu, rpc://tracker:port/key"

Opener = Callable[[SplitResult], Device]

_OPENERS: dict[str, Opener] = {
    "local": open_local,
    "ssh": open_ssh,
    "adb": open_adb,
    "qemu": open_qemu,
}


def register_device(scheme: str, opener: Opener) -> None:
    """Addresses of this scheme are opened by `opener`.

    For those that need more than NumPy: the runtime stays light, so it cannot import them.
    """
    assert scheme not in _OPENERS, f"addresses {scheme}: have an opener"
    _OPENERS[scheme] = opener


def open_device(address: str) -> Device:
    """The device at an address, connected, with a private folder on it.

    Raises:
        UserError: no such address.
        NoVerdictError: the device cannot be reached.
    """
    try:
        parts = urlsplit("local:" if address == "local" else address)
    except ValueError as error:
        raise UserError(f"--device {address}: {error}; choose from {ADDRESSES}") from None
    opener = _OPENERS.get(parts.scheme)
    if opener is None:
        raise UserError(f"unknown device {address!r}; choose from {ADDRESSES}")
    return opener(parts)


def unfit(url: str, reason: str) -> NoVerdictError:
    """The error for a device that is not what the bundle is for."""
    return NoVerdictError(f"{url} cannot run this bundle: {reason}")
