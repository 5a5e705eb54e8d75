"""Kubernetes: the API server as migproxy uses it."""
