"""The method on a loaded model: the hooks, what they hand on, what the cache carries, and the handle."""
