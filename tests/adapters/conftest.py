"""What tests of adapters share."""

from ranks import failures

__all__ = ["failures"]
