"""Helpers that every other folder uses: spaces, numbers, checks, files, threads. Nothing here knows models or policies."""
