"""Identifiers: random where they must not be guessed or met twice, short where a person reads them."""

from __future__ import annotations

import os
import secrets

__all__ = ["new_arena_id", "new_job_id", "new_token", "new_worker_id"]


def new_job_id() -> str:
    """A job's id, ``j-`` and 16 hex digits: unique across supervisors and restarts."""
    return f"j-{os.urandom(8).hex()}"  # what secrets.token_hex gives, at a third of its price


def new_worker_id(number: int) -> str:
    """A worker's id within its supervisor, ``w1``, ``w2``, ...: a restarted worker gets a new one."""
    return f"w{number}"


def new_arena_id() -> int:
    """An arena's id, 63 random bits: one per process life, so that it is the epoch as well."""
    return secrets.randbits(63)


def new_token() -> str:
    """An unguessable token of 128 bits, in hex."""
    return secrets.token_hex(16)
