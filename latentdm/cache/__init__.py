"""Encode once: moments are kept under keys that say all they depend on, and read before an image is opened."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdm.cache.cache import Cache

__all__ = ["Cache"]


def __getattr__(name: str) -> Any:
    """On first use: encoders import a module of this package, and `Cache` imports what they are made of."""
    if name == "Cache":
        from latentdm.cache.cache import Cache

        return Cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
