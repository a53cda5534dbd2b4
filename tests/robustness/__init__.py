"""Rough days: random calls, broken files, kills, full disks, many threads, long texts. Each is a command; README.md tells which."""
