"""Arithmetic on configurations: parameters, cache bytes, weight traffic; sees nothing but `hadal.config`."""

from hadal.plan.count import Count, active_bytes, count

__all__ = ["Count", "active_bytes", "count"]
