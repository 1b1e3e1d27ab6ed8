"""Errors that the command line prints as one line: each text says what is wrong, with which value, and the next step.

Leaves out: WireError, FrameError, CodecError and BundleError, which belong to the contract modules.
"""

from __future__ import annotations


class AgentError(Exception):
    """Base of what this package raises on purpose."""


class ConfigError(AgentError, ValueError):
    """The configuration cannot be used."""


class ExpertError(AgentError, ValueError):
    """A shard cannot be loaded or does not compute what its manifest says."""


class UnknownExpertError(AgentError, LookupError):
    """An expert is asked for that this node does not host."""


class ShardBusyError(AgentError, RuntimeError):
    """A shard is to go away while it computes."""


class MemoryLimitError(AgentError, MemoryError):
    """The shards do not fit into the memory that this agent may use."""


class AlreadyRunningError(AgentError, RuntimeError):
    """Another agent uses the same state folder."""


class CommandError(AgentError, ValueError):
    """A command's arguments cannot be used."""


class EnrolError(AgentError, RuntimeError):
    """The ground station gave no certificate this time; another try may succeed."""


class RefusedError(EnrolError):
    """The ground station refuses this node's claim or certificate."""


class CertificateError(AgentError, ValueError):
    """A certificate is not what this node may use."""


class ClockError(CertificateError):
    """A certificate is not valid yet by this machine's clock."""


class GuardError(AgentError, RuntimeError):
    """The guard's thread ended by itself: the board would be without protection."""


class DataPlaneError(AgentError, RuntimeError):
    """The data plane's thread ended by itself."""


class StartAgainError(AgentError, RuntimeError):
    """This agent ends so that the launcher starts another one: an update, or the one before it."""
