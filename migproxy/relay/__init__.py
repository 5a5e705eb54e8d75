"""The relay: the process that moves the bytes of migrations, and what the daemon speaks with it."""
