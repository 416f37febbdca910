"""Arithmetic on configurations: parameters, cache bytes; sees nothing but `hadal.config`."""

from hadal.plan.count import Count, count

__all__ = ["Count", "count"]
