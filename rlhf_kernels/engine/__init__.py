"""Checks, times, tunes and guards the ops that the rooms declare in their spec.py."""
