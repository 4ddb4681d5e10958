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


class CompileError(GfcompileError):
    """A stage of the compiler could not do its work on this model."""
