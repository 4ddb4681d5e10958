"""The errors that a user meets, and the exit code each one ends the command with."""


class GfcompileError(Exception):
    """Something went wrong that one clear line explains; the command exits with 1."""

    exit_code = 1


class UserError(GfcompileError, ValueError):
    """What was asked for cannot be: the value got, what is accepted; the command exits with 2."""

    exit_code = 2


class BundleError(GfcompileError):
    """A bundle that cannot be loaded: why, and what to do."""


class DeviceError(GfcompileError):
    """A device that cannot be reached or cannot run what was asked of it."""


class NoVerdictError(DeviceError):
    """A device that could not be asked: unreachable, lost, full, hung, or not the bundle's target.

    The command exits with 3, so that a build can tell it from a budget that was missed.
    """

    exit_code = 3


class CompileError(GfcompileError):
    """A stage of the compiler could not do its work on this model."""
