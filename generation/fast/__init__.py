"""Faster ways of a device, each of which proves itself against the slow one before it is taken. None knows what it is used for."""
