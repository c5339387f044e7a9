"""Every error that `lego_core` raises.

    LegoError                     whatever went wrong, the message says where and what to do
    ├── ConfigError               a merge configuration or weight that makes no sense
    ├── AdapterNotFoundError      no adapter at that place
    ├── AdapterFormatError        files that are not a readable PEFT LoRA adapter
    ├── AdapterWriteError         an adapter that cannot be written where it was to go
    ├── HubError                  the hub could not be reached, or did not deliver
    ├── AdapterChangedError       the files are no longer those that were asked for
    └── IncompatibleAdaptersError sound adapters that cannot be merged (or served) together

No other exception leaves the public functions, whatever the input.
"""

from __future__ import annotations


class LegoError(Exception):
    """Base class. `param` names the field of the configuration at fault, where there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(LegoError):
    """A merge configuration or a weight is out of its domain."""


class AdapterNotFoundError(LegoError):
    """The adapter's folder, repository or one of its files does not exist, or may not be read."""


class AdapterFormatError(LegoError):
    """The adapter's files cannot be read as a PEFT LoRA adapter, or use what cannot be merged."""


class AdapterWriteError(LegoError):
    """The adapter's folder is taken or cannot be written; what was there before is still there."""


class HubError(LegoError):
    """The hub could not be reached or did not deliver; it may work later."""


class AdapterChangedError(LegoError):
    """The adapter's content is not the content whose digest was asked for."""


class IncompatibleAdaptersError(LegoError):
    """Adapters that disagree with each other or with the base model."""
