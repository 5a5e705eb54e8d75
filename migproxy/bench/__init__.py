"""`migproxy bench`: migproxy beside what one would use instead, and beside the limit, on the machine it runs on.

Two processes of a generator in C (traffic.c) write and check data at the ends of a chain of two relays,
unix -> source -> TCP -> target -> unix, and what the relays' processes used is read from /proc.
"""
