"""Storages in a bucket: objects, the head of each folder, leases, and the copies in working folders."""
