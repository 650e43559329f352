"""Shared by all scripts: devices, processes, errors, files, the hub."""
