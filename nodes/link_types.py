"""The names of Legion's own link types: LegionPower's, so that its saved workflows connect."""

from __future__ import annotations

__all__ = ["LEGION_CAMPAIGN", "LEGION_CONFIG"]

LEGION_CONFIG = "LEGION_CONFIG"
LEGION_CAMPAIGN = "LEGION_CAMPAIGN"
