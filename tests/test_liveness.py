"""Unit tests of the backward slice and the liveness marks."""

from __future__ import annotations
