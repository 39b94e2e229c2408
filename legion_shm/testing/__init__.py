"""What tests of programs that use Legion can share: a check that nothing is left behind, node classes.

Owns no state. Nothing in the package itself imports it.

- `legion_shm.testing.leaks`: `snapshot` before, `assert_nothing_left` after.
- `legion_shm.testing.failpoints`: a fault at a named place, switched by the environment.
- `legion_shm.testing.nodes`: node classes that sleep, fail, crash, write where they should not.
"""

from __future__ import annotations

from legion_shm.testing.leaks import Snapshot, assert_nothing_left, snapshot

__all__ = ["Snapshot", "assert_nothing_left", "snapshot"]
