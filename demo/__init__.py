"""The laboratory: two nodes on one machine, a virtual machine, and migproxy between them."""
