"""KubeVirt's live-migration proxy as a node daemon of its own."""

__version__ = "0.1.0"
