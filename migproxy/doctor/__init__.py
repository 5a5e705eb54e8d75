"""`migproxy doctor`: checks a node, and the way to another one, and says what to do."""
