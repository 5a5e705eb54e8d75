"""KubeVirt's live-migration proxy as a node daemon of its own."""
